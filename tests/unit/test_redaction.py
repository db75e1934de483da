"""Keys and passwords stand in no message, and no setting or address that is written may hold them."""

import json

import click
import pytest
from click.testing import CliRunner

from mede2.trainer.answering.chat import check_address
from mede2.trainer.commandline import Commands, fail
from mede2.trainer.evaluation.run import parse_models
from mede2.trainer.redaction import has_credentials, without_secrets
from mede2.trainer.resolution import resolve


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("http://ann:hunter22@host:8000/v1 is down", "http://***@host:8000/v1 is down"),
        ("judge=model@https://tok_123@host/v1", "judge=model@https://***@host/v1"),
        ("http://ann:p@ss@host/v1", "http://***@host/v1"),
        ("http://a:b@one/ http://c:d@two/", "http://***@one/ http://***@two/"),
        ("GET https://host/v1?n=1&api_key=hunter22#a: 401", "GET https://host/v1?n=1&api_key=***#a: 401"),
        ("'https://host/?X-Amz-Security-Token=a%2Fb&n=2'", "'https://host/?X-Amz-Security-Token=***&n=2'"),
        ("s3://bucket/f?TOKEN=x", "s3://bucket/f?TOKEN=***"),
        ("https://host/v1?tokenizer=qwen&keys=3&monkey_business=1", None),
        ("https://host/v1?max_tokens=20", None),
        ("qwen@http://127.0.0.1:8000/v1", None),
        ("https://host/v1?to=someone@example.org", None),
    ],
)
def test_addresses(text, told):
    assert without_secrets(text) == (told or text)
    assert has_credentials(text) == (told is not None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{'Authorization': 'Bearer eyJhbGci.eyJz-_.c2ln=='}", "{'Authorization': 'Bearer ***'}"),
        ("authorization: bearer sk-0123456789, refused", "authorization: bearer ***, refused"),
        ("the bearer of this card", "the bearer of this card"),
    ],
)
def test_tokens_of_bearers(text, told):
    assert without_secrets(text) == told
    assert not has_credentials(text), "it is no address"


def test_secrets_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789")
    monkeypatch.setenv("hf_token", "hf_abcdefgh")
    monkeypatch.setenv("MY_PASSWORD", "short")
    monkeypatch.setenv("LONGER_SECRET", "sk-0123456789-and-more")
    text = "keys sk-0123456789, sk-0123456789-and-more and hf_abcdefgh; short stays"
    assert without_secrets(text) == "keys ***, *** and ***; short stays"


def test_no_error_of_a_command_tells_them(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    refused = CliRunner().invoke(click.Command("x", callback=lambda: fail("no 0123456789abcdef at http://a:b@host/")))
    assert refused.exit_code != 0
    assert refused.output == "Error: no *** at http://***@host/\n"


@pytest.mark.parametrize("url", ["http://ann:hunter22@host/", "http://hunter22@host/v1", "http://host/?key=hunter22"])
def test_an_address_with_a_key_in_it_is_refused(url):
    for refuse in (check_address, lambda url: parse_models([f"base=qwen@{url}"])):
        with pytest.raises(ValueError, match="an address without user, password or query") as told:
            refuse(url)
        assert "hunter22" not in str(told.value)


def test_a_setting_with_a_password_in_it_is_refused():
    """Settings go into settings.yaml, the model card and Weights & Biases."""
    for settings in (
        {"model": "https://ann:hunter22@hub/model"},
        {"train": ["a.jsonl", "s3://k:hunter22@b/c.jsonl"]},
        {"model": "https://hub/model?token=hunter22"},
    ):
        with pytest.raises(ValueError, match="an address with a user, password or key in it") as told:
            resolve(1, [("flag", settings)])
        assert "hunter22" not in str(told.value)


def test_commands_of_a_group_tell_none(monkeypatch, tmp_path):
    group = Commands("pairs", "", {"judge": "mede2.trainer.preference.judge"}, "pairs")
    files = {name: tmp_path / f"{name}.jsonl" for name in ("cases", "samples", "output")}
    options = [part for name, file in files.items() for part in (f"--{name}", str(file))]
    refused = CliRunner().invoke(group, ["judge", *options, "--judge", "http://ann:hunter22@host/v1"])
    assert refused.exit_code != 0
    assert refused.output.startswith("Error: ")
    assert "hunter22" not in refused.output


def test_a_key_in_the_file_of_deepspeed_is_refused(tmp_path):
    from mede2.trainer.deepspeed_file import read_deepspeed_file

    file = tmp_path / "z3.json"
    comet = {"enabled": True, "api_key": "hunter22"}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "comet": comet}))
    with pytest.raises(ValueError, match=r"comet\.api_key: DeepSpeed prints its file") as told:
        read_deepspeed_file(file)
    assert "hunter22" not in str(told.value)
