"""What may speak: every proof has a folder that passes and one that only this proof refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tests.serve.adapters import ROWS, base, saved

from files.families import V, family_model
from lofi.adapters.batched_product import PLAIN
from lofi.adapters.surgery import Adapted
from lofi.errors import AdapterFileError, ProofError, TargetError
from lofi.files.adapter_folder import read_folder
from lofi.files.golden import random_prompts
from lofi.files.layout import read_safetensors, save_safetensors
from lofi.serve.admission import Admission, _equal_in_batch, content_key
from quantized_models import quantized


class Wrong:
    """A product that does `what` instead of, or after, the right one."""

    name = "wrong"

    def __init__(self, what) -> None:
        self.what = what

    def prepare(self, a, b, ranks):
        right = PLAIN.prepare(a, b, ranks)
        return lambda x, slots, out: self.what(right, x, slots, out)


def admission(model=None, product=PLAIN) -> Admission:
    return Admission(base() if model is None else model, product=product)


def rewritten(folder, change):
    """The folder with other tensors."""
    tensors = read_safetensors(folder / "adapter_model.safetensors", finite=False)
    save_safetensors(folder / "adapter_model.safetensors", {name: change(t) for name, t in tensors.items()})
    return folder


def recorded(folder, change):
    """The folder with another lofi.json."""
    record = json.loads((folder / "lofi.json").read_text())
    change(record)
    (folder / "lofi.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("more", [{}, ROWS, {"use_dora": True}, {"target_modules": ["embed_tokens"]}])
def test_a_sound_adapter_is_admitted_without_a_note(tmp_path, more):
    made = admission().admit(saved(tmp_path / "a", **more))
    assert made.notes == () and made.packed.rank == 3 and len(made.key) == 64


def test_a_folder_of_peft_is_admitted_with_what_it_cannot_prove(tmp_path):
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(base(), config).save_pretrained(tmp_path / "a")
    made = admission().admit(tmp_path / "a")
    assert [note for note in made.notes if "has no lofi.json" in note]
    assert [note for note in made.notes if "has no golden prompts" in note]


def test_an_adapter_whose_update_is_zero_is_refused(tmp_path):
    folder = rewritten(saved(tmp_path / "a"), torch.zeros_like)
    with pytest.raises(ProofError, match="changes nothing: B A is zero in all 14 adapted modules"):
        admission().admit(folder)


def test_an_adapter_that_is_lost_in_rounding_is_refused(tmp_path):
    folder = rewritten(saved(tmp_path / "a", golden=False), lambda tensor: tensor * 1e-15)
    with pytest.raises(ProofError, match="with it the model gives the base's logits, bit for bit"):
        admission().admit(folder)


def test_an_adapter_that_speaks_through_its_token_rows_alone_is_asked_about_them(tmp_path):
    model = family_model("llama")  # the head is not tied: rows that no prompt holds would be unheard
    (own, *_) = set(range(V)) - {i for ids in random_prompts(V, count=4) for i in ids}
    folder = saved(tmp_path / "a", model, golden=False, target_modules=["q_proj"], trainable_token_indices=[own])
    path = folder / "adapter_model.safetensors"
    tensors = {k: t * (1e-15 if "lora_" in k else 1) for k, t in read_safetensors(path).items()}
    save_safetensors(path, tensors)
    assert admission(model).admit(folder).packed.rank == 3


def test_an_adapter_that_explodes_is_refused(tmp_path):
    folder = rewritten(saved(tmp_path / "a", golden=False), lambda tensor: tensor * 1e30)
    with pytest.raises(ProofError, match="makes the model's logits infinite or NaN"):
        admission().admit(folder)


def test_an_adapter_of_another_base_is_refused(tmp_path):
    with pytest.raises(ProofError, match=r"was trained on another base .*: same shapes, other weights"):
        admission().admit(saved(tmp_path / "a", base(seed=1)))


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"\x10"), "adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "adapter_config.json").unlink(), "is not an adapter folder"),
        (lambda f: rewritten(f, lambda t: t * float("nan")), "NaN"),
        (lambda f: rewritten(f, lambda t: t[:1]), "does not fit"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path, break_it, told):
    folder = saved(tmp_path / "a")
    break_it(folder)
    with pytest.raises(AdapterFileError, match=told):
        admission().admit(folder)


def test_what_cannot_share_a_batch_is_refused_with_what_to_do(tmp_path):
    folder = saved(tmp_path / "a", golden=False, modules_to_save=["norm"])
    with pytest.raises(
        TargetError, match=r"the adapter in /.*/a cannot share a batch with others.*merge it into the base"
    ):
        admission().admit(folder)


WRONG = {
    "nothing": lambda right, x, slots, out: None,
    "half of it": lambda right, x, slots, out: (right(x, slots, out), right(x * -0.5, slots, out)),
    "the base's rows too": lambda right, x, slots, out: right(x, slots.clamp(min=0), out),
    "another slot's": lambda right, x, slots, out: right(x, torch.where(slots == 1, -1, slots).int(), out),
    "NaN": lambda right, x, slots, out: out.mul_(float("nan")),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_batch_that_computes_something_else_is_found(tmp_path, what):
    folder = saved(tmp_path / "a", golden=False)
    with pytest.raises(ProofError, match="gives other logits in a batch with others than alone"):
        admission(product=Wrong(WRONG[what])).admit(folder)


def test_golden_prompts_with_other_logits_are_refused(tmp_path):
    def change(record):
        record["golden"]["prompts"][1]["top"][2][0][1] += 0.1

    folder = recorded(saved(tmp_path / "a"), change)
    with pytest.raises(ProofError, match=r"does not say what is on record: prompt 2: logits differ: step 2, logit of"):
        admission().admit(folder)


def test_a_token_that_has_become_the_likeliest_is_found(tmp_path):
    def change(record):
        first = record["golden"]["prompts"][0]["top"][0]
        del first[0]  # the likeliest is not on record

    folder = recorded(saved(tmp_path / "a"), change)
    with pytest.raises(ProofError, match="prompt 1: logits differ: step 0, the largest logit is"):
        admission().admit(folder)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_quantized_base_a_dense_ones_golden_prompts_are_not_asked(tmp_path, kind):
    made = admission(quantized(base(), kind)).admit(saved(tmp_path / "a", size=0.3))
    assert len(made.notes) == 1 and "was trained on a dense base and is loaded on" in made.notes[0]


def test_on_the_quantized_base_of_its_training_they_are(tmp_path):
    folder = saved(tmp_path / "a", quantized(base(), "nf4"), size=0.3)
    assert admission(quantized(base(), "nf4")).admit(folder).notes == ()
    recorded(folder, lambda record: record["golden"]["prompts"][0]["top"][0][0].__setitem__(1, 1e3))
    with pytest.raises(ProofError, match="does not say what is on record"):
        admission(quantized(base(), "nf4")).admit(folder)


def test_an_effect_within_a_bases_rounding_is_admitted_and_said(tmp_path):
    model = base(dtype=torch.bfloat16)
    folder = saved(tmp_path / "a", model, size=0.005, target_modules=["v_proj"], golden=False)
    dropped = Wrong(lambda right, x, slots, out: None)
    assert any("is within this base's rounding" in note for note in admission(model, dropped).admit(folder).notes)


def test_an_effect_above_rounding_that_is_mostly_lost_is_refused_though_no_logit_is_far_off(tmp_path):
    base, effect = torch.zeros(4, 3, 5), torch.tensor([1.5, 0, 1.5, 0])[:, None, None]
    assert _equal_in_batch(tmp_path, base, base + 1.5, base + 0.6 * effect, 1.0) == [], "60 % are there"
    with pytest.raises(ProofError, match=r"off by 0\.9, tolerance 1, its whole effect 1\.5"):
        _equal_in_batch(tmp_path, base, base + 1.5, base + 0.4 * effect, 1.0)


def test_the_model_that_serves_is_not_touched(tmp_path):
    model = base()
    ids = torch.randint(0, V, (2, 7))
    trainable = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        before = model(ids).logits
        admission(model).admit(saved(tmp_path / "a"))
        assert torch.equal(model(ids).logits, before)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not any(isinstance(module, Adapted) for module in model.modules())


def test_a_refusal_leaves_no_trace_and_the_next_folder_is_admitted(tmp_path):
    desk = admission()
    for n in range(2):
        with pytest.raises(ProofError):
            desk.admit(rewritten(saved(tmp_path / f"dead{n}", golden=False), lambda tensor: tensor * 1e-15))
        assert desk.admit(saved(tmp_path / f"a{n}", seed=n)).notes == ()


def test_the_same_content_is_proved_once(tmp_path):
    calls = []
    desk = admission(product=Wrong(lambda right, *given: (calls.append(1), right(*given))))
    first = desk.admit(saved(tmp_path / "a"))
    proved = len(calls)
    second = desk.admit(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    assert first.key == second.key and proved and len(calls) == proved


def test_the_key_is_of_tensors_and_config_and_nothing_else(tmp_path):
    key = content_key(read_folder(saved(tmp_path / "a")))
    copied = shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    (copied / "README.md").write_text("words")
    assert content_key(read_folder(copied)) == key
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 8}))
    assert content_key(read_folder(copied)) != key
    assert content_key(read_folder(rewritten(tmp_path / "a", lambda tensor: tensor * 1.001))) != key


def test_reading_again_gives_the_same_tensors_or_refuses(tmp_path):
    desk = admission()
    made = desk.admit(saved(tmp_path / "a", **ROWS))
    again = desk.reread(tmp_path / "a", made.key)
    assert again.parts.keys() == made.packed.parts.keys()
    path = "model.layers.1.mlp.down_proj"
    assert torch.equal(again.parts[path].b, made.packed.parts[path].b)
    rewritten(tmp_path / "a", lambda tensor: tensor * 1.001)
    with pytest.raises(AdapterFileError, match="holds another adapter than the one that was admitted; load it again"):
        desk.reread(tmp_path / "a", made.key)
