"""Clusters: GPUs by their datasheets, nodes, and the links between them."""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind in nodes alike. Memory in 1e9 bytes, rates in 1e12 operations or 1e9 bytes a second.

    Attributes:
        name: of the GPU.
        memory_gb: of one GPU, as torch sees it.
        matrix_tflops: dense bf16 products with fp32 sums.
        memory_gb_s: of its own memory.
        link_gb_s: of a GPU to the others in its node, in one direction.
        network_gb_s: of a GPU's share of the network between nodes, in one direction.
        host_gb_s: of a GPU to its host, in one direction.
        host_memory_gb, host_memory_gb_s: of a node.
        nodes, gpus_per_node: how many.
    """

    name: str
    memory_gb: float
    matrix_tflops: float
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float
    host_gb_s: float
    host_memory_gb: float
    host_memory_gb_s: float = 200.0
    nodes: int = 1
    gpus_per_node: int = 8

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    def __str__(self) -> str:
        return f"{self.name}:{self.nodes}x{self.gpus_per_node}"


# From NVIDIA's datasheets. Products: dense; where a sheet gives the rate with sparsity, half of it. Links: of NVLink's
# sum of both directions, half. Networks: 8 ports of a DGX's ConnectX for 8 GPUs. Host memory: of the DGX, or usual.
# Memory: what torch's errors call the total capacity: 79.1 GiB of an H100 and an A100, 139.7 of an H200, 23.6 of an RTX
# 4090, 44.4 of an RTX 6000 Ada with ECC; of a B200 the sheet's 180 GB.
PRESETS = {
    # "NVIDIA A100 80GB SXM": 312 TFLOPS, 2039 GB/s, NVLink 600 GB/s; DGX A100: 8 x 200 Gb/s, PCIe 4 x16, 2 TB
    "a100": Cluster("a100", 84.9, 312, 2039, 300, 25, 32, 2000),
    # "NVIDIA H100 SXM": 1979 TFLOPS with sparsity, 3.35 TB/s, 900 GB/s; DGX H100: 8 x 400 Gb/s, PCIe 5 x16, 2 TB
    "h100": Cluster("h100", 84.9, 989.5, 3350, 450, 50, 64, 2000),
    # "NVIDIA H200 SXM": 141 GB, 1979 TFLOPS with sparsity, 4.8 TB/s, 900 GB/s; DGX H200 as H100
    "h200": Cluster("h200", 150.0, 989.5, 4800, 450, 50, 64, 2000),
    # "NVIDIA DGX B200", 8 GPUs: 1440 GB, 64 TB/s, 144 PFLOPS FP4 with sparsity (bf16 1/8 of it dense), NVLink 14.4 TB/s
    "b200": Cluster("b200", 180, 2250, 8000, 900, 50, 64, 2000),
    # "GeForce RTX 4090" (Ada whitepaper): 24 GB, 165.2 TFLOPS bf16 with fp32 sums, 1008 GB/s; PCIe 4 x16, no NVLink
    "rtx4090": Cluster("rtx4090", 25.3, 165.2, 1008, 32, 3, 32, 128, 60, 1, 1),
    # "NVIDIA RTX 6000 Ada": 48 GB, 960 GB/s, 1457 TFLOPS FP8 with sparsity, so 364 dense bf16; PCIe 4 x16, no NVLink
    "rtx6000ada": Cluster("rtx6000ada", 47.7, 364, 960, 32, 3, 32, 256, 100, 1, 1),
}


def read_cluster(text: str) -> Cluster:
    """A cluster: `h100:4x8` (4 nodes of 8), `h100:8` (a node of 8), `h100`, or a YAML file of `Cluster`'s fields, which
    may name a preset as `name` and say only what differs.

    Raises:
        ValueError: neither; names what is wrong.
    """
    if Path(text).suffix in (".yaml", ".yml"):
        return _from_file(Path(text))
    match = re.fullmatch(r"([\w-]+?)(?::(?:(\d+)x)?(\d+))?", text)
    if match is None or match[1] not in PRESETS:
        raise ValueError(
            f"cluster: {text!r} is not NAME:NODESxGPUS, such as h100:4x8, of {', '.join(PRESETS)}, nor a YAML file"
        )
    preset = PRESETS[match[1]]
    nodes, gpus = int(match[2] or 1), int(match[3] or preset.gpus_per_node)
    if nodes < 1 or gpus < 1:
        raise ValueError(f"cluster: {text!r} has no GPU")
    return replace(preset, nodes=nodes, gpus_per_node=gpus)


def _from_file(path: Path) -> Cluster:
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cluster: cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"cluster: {path} is not YAML: {error}") from error
    known = {item.name: item.type for item in fields(Cluster)}
    if not isinstance(given, dict) or "name" not in given:
        raise ValueError(f"cluster: {path} must hold `field: value` lines, with a name")
    for field, value in given.items():
        if field not in known:
            raise ValueError(f"cluster: {path}: {field}: unknown; known: {', '.join(known)}")
        kinds = {"name": str, "nodes": int, "gpus_per_node": int}.get(field, (int, float))
        if not isinstance(value, kinds) or isinstance(value, bool) or (field != "name" and value <= 0):
            raise ValueError(f"cluster: {path}: {field}: {value!r} is not {'text' if field == 'name' else 'above 0'}")
    preset = PRESETS.get(given["name"])
    if preset:
        return replace(preset, **given)
    needed = [item.name for item in fields(Cluster) if item.name not in given and item.default is item.default_factory]
    if needed:
        raise ValueError(f"cluster: {path} lacks {', '.join(needed)}")
    return Cluster(**given)
