"""Letting go of accumulated gradients, wherever DeepSpeed 0.19 holds them."""


def clear_gradients(zero) -> None:
    """Let go of the gradients of the micro-batches so far.

    Between two backwards its buckets are empty; what has been summed up is in the parameters and, by the kind of ZeRO,
    in buffers of its own. The next backward adds to most of them, but overwrites those for which it counts
    micro-batches from zero; of parameters that are not in it they would keep the old values.

    Args:
        zero: DeepSpeed's optimizer, of an engine that is between two backwards.
    """
    if hasattr(zero, "clear_hp_grads"):  # ZeRO-1 in bf16
        zero.clear_hp_grads()
        zero.clear_lp_grads(set_to_none=True)
        return
    zero.zero_grad(set_to_none=True)
    if hasattr(zero, "grad_partitions_flat_buffer"):  # ZeRO-3; its zero_grad has set the count
        zero.grad_partitions_flat_buffer.zero_()
        zero.averaged_gradients.clear()
        zero._offload_boundary_param_ids.clear()
        masters, offloads = zero.fp32_partitioned_groups_flat, zero.offload_optimizer
    else:
        zero.micro_step_id = -1  # the next backward is number 0
        for held in (zero.averaged_gradients, zero.all_grad_tensors):
            held.update(dict.fromkeys(held))
        masters, offloads = zero.single_partition_of_fp32_groups, zero.cpu_offload
        if offloads:
            zero._offload_accumulated_param_ids.clear()
    if offloads:
        zero.reset_cpu_buffers()
        for master in masters:
            if master.grad is not None:
                master.grad.zero_()
