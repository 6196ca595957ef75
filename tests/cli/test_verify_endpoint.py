"""`lofi verify --endpoint`: passes on lofi's own server, fails when weights, adapter or template are altered there."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time

import pytest

from lofi.cli.main import main
from stub_server import Speaker, serving, speaking


@contextlib.contextmanager
def listening(app):
    """A uvicorn in a thread, on a free port."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started and time.monotonic() < end:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def changed(folder, target, *, scale=1.0, template=None):
    """A copy of an adapter folder with other weights or another template, and nothing on record to hold it to."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "adapter_model.safetensors")
    tensors = {key: tensor * scale if "lora_B" in key else tensor for key, tensor in tensors.items()}
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    record = json.loads((target / "lofi.json").read_text())
    del record["golden"]
    record["text_format"]["template"] = template or record["text_format"]["template"]
    (target / "lofi.json").write_text(json.dumps(record))
    return target


@pytest.fixture(scope="module")
def address(finished, small_model, tmp_path_factory):
    """lofi's own server with the trained adapter, one of other weights and one of another template."""
    pytest.importorskip("fastapi")
    from lofi.serve.app import create_app
    from lofi.serve.limits import Settings
    from lofi.serve.run import ServeOptions, open_service

    root, first = tmp_path_factory.mktemp("served"), finished / "adapter"
    template = json.loads((first / "lofi.json").read_text())["text_format"]["template"]
    adapters = {
        "first": first,
        "heavier": changed(first, root / "heavier", scale=1.2),
        "misspoken": changed(
            first, root / "misspoken", template=template.replace("'<|im_start|>'+", "'<|im_start|>the '+")
        ),
    }
    service = open_service(ServeOptions(model=str(small_model), adapters=adapters, dtype="fp32", device="cpu"))
    try:
        with listening(create_app(service, Settings())) as url:
            yield url
    finally:
        service.engine.stop()


def test_lofis_own_server_says_what_the_adapter_said(address, finished, capsys):
    assert main(["verify", str(finished), "--endpoint", address]) == 0
    said = capsys.readouterr().out
    assert "first at http" in said and "the same to 3 golden prompts" in said
    assert "tokens, log probabilities, stops, the chat template (3 prompts)" in said


def test_the_answer_as_json_says_what_was_compared(address, finished, capsys):
    flags = ["--endpoint", f"{address}/v1/", "--endpoint-model", "first", "--dtype", "bf16", "--json"]
    assert main(["verify", str(finished), *flags]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["same"] and answer["prompts"] == 3 and answer["model"] == "first"
    assert answer["tolerance"] > 0.001  # bf16, wider than what was recorded


@pytest.mark.parametrize(("model", "level"), [("heavier", "logits"), ("small", "logits"), ("misspoken", "template")])
def test_what_was_altered_on_the_server_is_found(address, finished, model, level, capsys):
    assert main(["verify", str(finished), "--endpoint", address, "--endpoint-model", model]) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert (
        f"{model} at {address} does not say what the adapter said when it was saved: prompt 1: {level} differ"
        in told[0]
    )


def test_a_name_the_server_does_not_have_is_answered_with_its_names(address, finished, capsys):
    assert main(["verify", str(finished), "--endpoint", address, "--endpoint-model", "frist"]) == 2
    assert "did you mean first?" in capsys.readouterr().err


def test_a_server_without_a_tokenizer_here_is_verified_by_ids_and_that_is_said(finished, adapter, tmp_path, capsys):
    record = json.loads((adapter / "lofi.json").read_text())
    record["base"]["path"] = str(tmp_path / "gone")
    (adapter / "lofi.json").write_text(json.dumps(record))
    with speaking(Speaker(record["golden"], models=("copy",))) as url:
        assert main(["verify", str(adapter), "--endpoint", url]) == 0
    assert "the chat template was not checked, for there is no tokenizer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "sentence"),
    [
        (["--endpoint", "http://127.0.0.1:9"], 2, "nothing answers at http://127.0.0.1:9"),
        (["--endpoint", "localhost"], 2, "expected an address such as"),
        (["--endpoint", "URL", "--device", "cpu"], 2, "--device says nothing beside --endpoint"),
        (["--endpoint", "URL", "--quantization", "nf4"], 2, "--quantization says nothing beside --endpoint"),
        (["--endpoint", "URL", "--dtype", "int3"], 2, "--dtype is int3"),
        (["--endpoint-model", "x"], 2, "--endpoint-model needs --endpoint"),
        (["--api-key", "x"], 2, "--api-key needs --endpoint"),
    ],
)
def test_a_wrong_request_is_one_sentence(finished, flags, code, sentence, capsys):
    golden = json.loads((finished / "adapter" / "lofi.json").read_text())["golden"]
    with speaking(Speaker(golden)) as url:
        assert main(["verify", str(finished), *[url if flag == "URL" else flag for flag in flags]]) == code
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and sentence in told[0]


def test_the_key_goes_with_every_request_and_is_not_shown(finished, capsys):
    with serving(lambda *_: (401, {"error": {"message": "no"}}, {})) as url:
        assert main(["verify", str(finished), "--endpoint", url, "--api-key", "hunter2"]) == 2
    told = capsys.readouterr().err
    assert "give another key with --api-key" in told and "hunter2" not in told


def test_an_adapter_without_golden_prompts_cannot_be_replayed(adapter, capsys):
    record = json.loads((adapter / "lofi.json").read_text())
    (adapter / "lofi.json").write_text(json.dumps({k: v for k, v in record.items() if k != "golden"}))
    assert main(["verify", str(adapter), "--endpoint", "http://127.0.0.1:9"]) == 1
    assert "holds no golden prompts" in capsys.readouterr().err
