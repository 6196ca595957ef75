"""Merging folders: the base's files with the update added, proved, and nothing given ever changed."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lofi
from files.families import family_model, logits, stir
from lofi.errors import LofiError, LofiWarning, ModelError, ProofError, RequestError
from lofi.files.layout import read_header
from lofi.merge.disk import merge_folder
from lofi.merge.shards import write_shards
from lofi.models.load import load_model


def make(tmp_path: Path, family: str, *, dtype=torch.float32, shard: str = "50GB", **config) -> tuple[Path, Path]:
    """A base folder and an adapter folder on it."""
    family_model(family, dtype=dtype).save_pretrained(tmp_path / "base", max_shard_size=shard)
    model = load_model(tmp_path / "base")
    lofi.add_adapter(model, lofi.LoraConfig(**{"r": 3, "lora_alpha": 7, **config}))
    stir(model)
    lofi.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def opened(base: Path, adapter: Path):
    model = load_model(base)
    lofi.load_adapter(model, adapter)
    return model


@pytest.mark.parametrize(
    ("family", "config", "road"),
    [
        ("llama", {}, "shard by shard"),
        ("llama_tied", {}, "shard by shard"),
        ("gpt2", {"bias": "all"}, "shard by shard"),
        ("bloom", {}, "shard by shard"),
        ("t5", {}, "shard by shard"),
        ("mixtral", {}, "shard by shard"),
        ("llama", {"target_modules": ["lm_head", "q_proj"], "modules_to_save": ["model.norm"]}, "shard by shard"),
        ("llama_tied", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 2]}, "shard by shard"),
        ("llama_tied", {"target_modules": ["embed_tokens"]}, "through"),
        ("llama_tied", {"target_modules": ["lm_head", "v_proj"]}, "through"),
        ("mixtral", {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}, "through"),
        ("bert", {"target_modules": ["query"]}, "shard by shard"),
    ],
)
def test_the_merged_folder_says_what_base_and_adapter_say(family, config, road, tmp_path):
    base, adapter = make(tmp_path, family, **config)
    before = digest(base), digest(adapter)
    report = merge_folder(base, adapter, tmp_path / "out")
    assert (digest(base), digest(adapter)) == before
    assert report.road.startswith(road)
    expected = logits(opened(base, adapter))
    assert (logits(load_model(tmp_path / "out")) - expected).abs().max() < 1e-5
    assert report.verdict.max_logit_error < 1e-5 and report.verdict.top1_agreement == 1.0
    assert (logits(load_model(base)) - expected).abs().max() > 1e-3
    assert not [p.name for p in tmp_path.iterdir() if ".lofi-" in p.name]


def test_a_sharded_base_keeps_its_files_index_dtypes_and_metadata(tmp_path):
    base, adapter = make(tmp_path, "llama", shard="6KB", dtype=torch.bfloat16, target_modules=["q_proj"])
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 3
    first = {k: v.clone() for k, v in load_file(shards[0]).items()}  # one tensor of another dtype, as norms often are
    name = next(k for k in first if "q_proj" not in k)
    first[name] = first[name].float()
    save_file(first, shards[0], metadata={"format": "pt", "made": "here"})
    report = merge_folder(base, adapter, tmp_path / "out")
    assert report.changed == 2
    assert report.road == "shard by shard"
    for shard in shards:
        was, now = read_header(shard), read_header(tmp_path / "out" / shard.name)
        assert was == now
        old, new = load_file(shard), load_file(tmp_path / "out" / shard.name)
        assert all(torch.equal(old[k], new[k]) != ("q_proj" in k) for k in old)
    index = "model.safetensors.index.json"
    assert (tmp_path / "out" / index).read_bytes() == (base / index).read_bytes()


def test_tokenizer_template_and_settings_come_along_and_old_weights_do_not(tmp_path, lofi_tiny):
    base = tmp_path / "base"
    shutil.copytree(lofi_tiny, base)
    (base / "pytorch_model.bin").write_bytes(b"old")
    (base / "README.md").write_text("the base's card")
    model = load_model(base)
    lofi.add_adapter(model, lofi.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    stir(model)
    lofi.save_adapter(model, tmp_path / "adapter")
    report = merge_folder(base, tmp_path / "adapter", tmp_path / "out")
    kept = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*kept, "model.safetensors", "lofi_merge.json"}
    assert all((tmp_path / "out" / f).read_bytes() == (base / f).read_bytes() for f in kept)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert json.loads((tmp_path / "out" / "lofi_merge.json").read_text()) == report.to_dict()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert any("next token" in line for line in report.lines())


def test_a_checkpoint_without_the_base_prefix_keeps_its_keys(tmp_path):
    base, adapter = make(tmp_path, "gpt2")
    file = base / "model.safetensors"
    with safe_open(file, "pt") as stored:
        renamed = {k.removeprefix("transformer."): stored.get_tensor(k).clone() for k in stored.keys()}  # noqa: SIM118
    save_file(renamed, file, metadata={"format": "pt"})
    report = merge_folder(base, adapter, tmp_path / "out")
    assert report.road == "shard by shard" and report.verdict.max_logit_error < 1e-5
    assert read_header(tmp_path / "out" / "model.safetensors") == read_header(file)


def test_a_new_classification_head_is_written_with_its_labels(tmp_path):
    from transformers import LlamaForCausalLM

    llama = family_model("llama")
    assert isinstance(llama, LlamaForCausalLM)
    llama.save_pretrained(tmp_path / "base")
    model = load_model(tmp_path / "base", task="SEQ_CLS", labels=["no", "maybe", "yes"])
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7))
    stir(model)
    lofi.save_adapter(model, tmp_path / "adapter", record={"labels": ["no", "maybe", "yes"]})
    merge_folder(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged = load_model(tmp_path / "out")
    assert type(merged).__name__ == "LlamaForSequenceClassification" and merged.config.id2label[2] == "yes"
    assert (logits(merged) - logits(model)).abs().max() < 1e-5


def data_file(tmp_path: Path) -> Path:
    """Rows that are easy to learn by heart."""
    path = tmp_path / "held_out.jsonl"
    rows = [{"prompt": f"Say {word}", "completion": f"{word} {word}"} for word in "abcdefghijklmnop"]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_on_data_the_share_of_the_gain_is_said_and_min_kept_refuses(trained, tmp_path, lofi_tiny):
    adapter, data = trained
    report = merge_folder(lofi_tiny, adapter, tmp_path / "out", data=data, min_kept=0.9)
    share = report.verdict.share_kept
    assert share is not None and 0.9 < share.low <= share.value <= share.high < 1.1
    losses = report.verdict.losses
    assert losses["adapter"].value < losses["base"].value - 0.5
    assert abs(losses["merged"].value - losses["adapter"].value) < 0.2
    rows = {(row["who"], row["metric"]): row for row in report.to_dict()["results"]}
    assert rows["merged", "share_kept"]["n"] == 16 and rows["base", "loss"]["value"] == losses["base"].value


def test_a_merge_that_loses_most_of_it_is_refused_and_the_old_one_stays(trained, tmp_path, lofi_tiny, monkeypatch):
    from lofi.merge import writing

    adapter, data = trained
    merge_folder(lofi_tiny, adapter, tmp_path / "out")
    before = digest(tmp_path / "out")

    def faint(plan, folder, output):
        for change in plan.values():
            change.part.scale /= 20
        return write_shards(plan, folder, output)

    monkeypatch.setattr(writing, "write_shards", faint)
    with pytest.raises(ProofError, match=r"keeps 0\.\d+ of the adapter's gain, less than min_kept 0\.95"):
        merge_folder(lofi_tiny, adapter, tmp_path / "out", data=data, min_kept=0.95)
    assert digest(tmp_path / "out") == before
    assert [p.name for p in tmp_path.iterdir() if ".lofi-" in p.name] == []


def test_without_a_gain_there_is_no_share_and_min_kept_refuses(tmp_path, lofi_tiny):
    model = load_model(lofi_tiny)
    lofi.add_adapter(model, lofi.LoraConfig(r=4, target_modules=["q_proj"]))
    generator = torch.Generator().manual_seed(2)
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_B" in name:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 1e-7)
    lofi.save_adapter(model, tmp_path / "adapter")
    data = data_file(tmp_path)
    data.write_text(data.read_text().splitlines()[0])  # one example cannot say how sure its gain is
    with pytest.warns(LofiWarning, match="rounds this adapter away"):
        report = merge_folder(lofi_tiny, tmp_path / "adapter", tmp_path / "out", data=data)
    assert report.verdict.share_kept is None and "cannot be told from 0" in "\n".join(report.lines())
    with pytest.raises(ProofError, match="gain cannot be told from 0"):
        merge_folder(lofi_tiny, tmp_path / "adapter", tmp_path / "out2", data=data, min_kept=0.5)
    assert not (tmp_path / "out2").exists()


# ---- refusals


@pytest.mark.parametrize("where", ["base", "adapter", "base/inside", "."])
def test_an_output_that_would_touch_what_was_given_is_refused(where, tmp_path):
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    before = digest(tmp_path)
    with pytest.raises(RequestError, match="which a merge never changes"):
        merge_folder(base, adapter, tmp_path / where)
    assert digest(tmp_path) == before


def test_an_output_that_holds_something_else_is_refused_and_an_old_merge_is_replaced(tmp_path):
    base, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(LofiError, match=r"holds thesis\.tex"):
        merge_folder(base, adapter, tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").unlink()
    merge_folder(base, adapter, tmp_path / "out")
    merge_folder(base, adapter, tmp_path / "out")


def test_another_base_is_refused(tmp_path):
    _, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    family_model("llama", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ProofError, match="another base"):
        merge_folder(tmp_path / "other", adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_base_is_one_sentence(tmp_path):
    _, adapter = make(tmp_path, "llama", target_modules=["q_proj"])
    with pytest.raises(ModelError, match="no model folder"):
        merge_folder(tmp_path / "nowhere", adapter, tmp_path / "out")


def test_min_kept_needs_data_and_a_share(tmp_path):
    with pytest.raises(RequestError, match="min_kept needs data"):
        merge_folder(tmp_path, tmp_path, tmp_path, min_kept=0.9)
    with pytest.raises(RequestError, match=r"min_kept is 95, expected a share"):
        merge_folder(tmp_path, tmp_path, tmp_path, data="x", min_kept=95)


FULL = """
import resource, sys
from lofi.errors import LofiError
from lofi.merge.disk import merge_folder
# imported before the limit: compiled files are written too
import lofi.models.load, lofi.models.quantization, lofi.data.prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    merge_folder(*sys.argv[1:4])
except LofiError as error:
    print(error)
"""


@pytest.mark.parametrize("targets", [["q_proj"], ["lm_head"]])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(targets, tmp_path):
    base, adapter = make(tmp_path, "llama_tied", target_modules=targets)
    before = digest(tmp_path)
    said = run(FULL, base, adapter, tmp_path / "out")
    assert said.startswith("the disk is full: ") and said.count("\n") == 1
    assert digest(tmp_path) == before


def run(script: str, *arguments: Path) -> str:
    source = Path(__file__).resolve().parents[2] / "src"
    env = {"PYTHONPATH": str(source), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    said = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert said.returncode == 0, said.stderr
    return said.stdout


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from lofi.merge.source import NAME, Source
from lofi.merge.shards import plan_shards, write_shards
from lofi.files.adapter_folder import read_folder

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

base, adapter, out = map(Path, sys.argv[1:4])
out.mkdir()
model = Source(base, read_folder(adapter), None).open()
peak, done = [anonymous()], []
def watch():
    while not done:
        peak.append(anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
start = anonymous()
thread.start()
write_shards(plan_shards(model, NAME, base), base, out)
done.append(1)
thread.join()
print(max(peak) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to measure memory")
def test_at_most_two_shards_are_in_memory_while_writing(tmp_path):
    big = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4000}
    family_model("llama", **big).save_pretrained(tmp_path / "base", max_shard_size="12MB")
    model = load_model(tmp_path / "base")
    lofi.add_adapter(model, lofi.LoraConfig(r=3, lora_alpha=7, target_modules=["up_proj", "q_proj"]))
    stir(model)
    lofi.save_adapter(model, tmp_path / "adapter")
    shards = [p.stat().st_size for p in (tmp_path / "base").glob("*.safetensors")]
    assert sum(shards) > 5 * max(shards)
    assert int(run(MEASURE, tmp_path / "base", tmp_path / "adapter", tmp_path / "out")) < 2 * max(shards)
