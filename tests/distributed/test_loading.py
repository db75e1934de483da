"""Loading under ZeRO-3: no rank ever holds the model whole, and only rank 0 reads values."""

import pytest


@pytest.fixture(scope="session")
def loads(launch, models) -> list[dict]:
    return launch("loading", 2, scenarios=["warm_up", "partitioned", "plain"], models=models)


def test_the_model_is_large_enough_to_be_measured(loads):
    assert loads[0]["partitioned"]["whole"] > 60e6


def test_each_rank_holds_its_half(loads):
    for result in loads:
        share = result["partitioned"]["held"] / result["partitioned"]["whole"]
        assert 0.49 < share < 0.53  # norms and biases are rounded up
    assert sum(result["partitioned"]["held"] for result in loads) >= loads[0]["partitioned"]["whole"]


def test_no_rank_ever_holds_more_than_its_half_and_a_layer(loads):
    for result in loads:
        assert result["partitioned"]["peak"] < 0.66 * result["partitioned"]["whole"]


def test_only_rank_zero_reads_values_and_each_one_once(loads):
    assert loads[0]["partitioned"]["values_read"] * 4 == loads[0]["partitioned"]["whole"]
    assert loads[1]["partitioned"]["values_read"] == 0


def test_the_measure_tells_a_whole_model_from_a_half(loads):
    """A load that is not partitioned breaks both bounds above, on every rank."""
    for result in loads:
        assert result["plain"]["peak"] > 0.95 * result["plain"]["whole"]
        assert result["plain"]["held"] == result["plain"]["whole"]
        assert result["plain"]["values_read"] > 0


def test_the_halves_make_up_the_model(loads):
    together = sum(result["partitioned"]["checksum"] for result in loads)
    assert together == pytest.approx(loads[0]["plain"]["checksum"], rel=1e-9)
