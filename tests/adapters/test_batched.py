"""Many adapters in one forward: each token gets what its own adapter alone would give it, or an error."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

import lofi
from adapters.mixes import Mix, close, mix, stir
from adapters.models import ids, toy
from files.families import V, family_model
from lofi.adapters.batched import AdapterBank, pack
from lofi.adapters.batched_product import PLAIN
from lofi.adapters.surgery import Adapted
from lofi.adapters.switch import using
from lofi.adapters.twin import twin
from lofi.errors import TargetError
from quantized_models import quantized

SMALL = lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "down"])
WIDE = lofi.LoraConfig(r=8, lora_alpha=4, target_modules=["up"], use_rslora=True)
DORA = lofi.LoraConfig(r=2, lora_alpha=3, target_modules=["up", "down", "head"], use_dora=True)
BIAS = lofi.LoraConfig(r=4, lora_alpha=7, target_modules=["down"], bias="lora_only")
SHIFTED = lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["up", "embed"], init_lora_weights="pissa")
EMBED = lofi.LoraConfig(r=5, lora_alpha=9, target_modules=["embed", "head"])
ROWS = lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["up"], trainable_token_indices={"embed": [1, 3, 9]})
KINDS = {
    "lora": SMALL, "rslora": WIDE, "dora": DORA, "bias": BIAS, "shifted": SHIFTED,
    "embedding": EMBED, "rows": ROWS,
}  # fmt: skip


def prompts(rows: int = 4, length: int = 9, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(seed))


class Counting:
    """The plain product, counting its calls."""

    name = "counting"

    def __init__(self) -> None:
        self.calls = 0

    def prepare(self, a, b, ranks):
        call = PLAIN.prepare(a, b, ranks)

        def counted(x, slots, out):
            self.calls += 1
            call(x, slots, out)

        return counted


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_mixed_batch_is_what_its_adapter_alone_gives(kind):
    made = mix(toy(), KINDS[kind], SMALL)
    slots = [0, -1, 1]
    wanted = made.alone(ids(), slots)
    assert not close(wanted[0], made.alone(ids(), [-1] * 3)[0], 1e-2)  # the adapter says something
    assert close(made.batch(ids(), slots), wanted)


def test_adapters_of_every_kind_share_a_batch():
    made = mix(toy(), *KINDS.values())
    rows = torch.randint(0, 11, (9, 5), generator=torch.Generator().manual_seed(2))
    slots = [*range(7), -1, 0]
    assert close(made.batch(rows, slots), made.alone(rows, slots))


def test_fifty_random_mixes_are_what_each_adapter_alone_gives():
    draw = random.Random(0)
    for _ in range(50):
        configs = [
            lofi.LoraConfig(
                r=draw.randint(1, 32),
                lora_alpha=draw.randint(1, 48),
                target_modules=draw.sample(["embed", "up", "down", "head"], draw.randint(1, 4)),
                bias=draw.choice(["none", "lora_only"]),
                use_rslora=draw.random() < 0.3,
            )
            for _ in range(draw.randint(1, 5))
        ]
        made = mix(toy(draw.randint(0, 99)), *configs)
        rows = torch.randint(0, 11, (draw.randint(1, 6), draw.randint(1, 7)))
        slots = [draw.randint(-1, len(configs) - 1) for _ in rows]
        assert close(made.batch(rows, slots), made.alone(rows, slots)), (configs, slots)


def test_tokens_of_one_row_may_use_different_adapters():
    made = mix(toy(), SMALL, DORA)
    slots = torch.tensor([0, 1, -1, 1, 0] * 3, dtype=torch.int32)
    with torch.no_grad(), made.bank.routed(slots):
        got = made.model(ids()).view(15, -1)
    each = {slot: made.alone(ids(), [slot] * 3).view(15, -1) for slot in (0, 1, -1)}
    wanted = torch.stack([each[int(slot)][token] for token, slot in enumerate(slots)])
    assert close(got, wanted)


def test_a_row_without_adapter_is_the_base_bit_for_bit():
    base = toy()(ids()).detach()
    made = mix(toy(), *KINDS.values())
    assert torch.equal(made.batch(ids(), [0, -1, 6])[1], base[1])


def test_outside_of_a_route_the_model_is_its_base_bit_for_bit():
    base = toy()(ids()).detach()
    made = mix(toy(), *KINDS.values())
    with torch.no_grad(), made.bank.routed(None):
        assert torch.equal(made.model(ids()), base)
    assert torch.equal(made.model(ids()), base)


def test_a_route_within_a_route_ends_with_its_block():
    made = mix(toy(), SMALL, WIDE)
    wanted = made.batch(ids(), [0, 0, 0])
    with torch.no_grad(), made.bank.routed(torch.zeros(15, dtype=torch.int32)):
        with pytest.raises(KeyError), made.bank.routed(None):
            raise KeyError
        assert torch.equal(made.model(ids()), wanted)


def test_the_modules_that_no_adapter_needs_are_untouched():
    model = toy()
    made = mix(model, SMALL, EMBED)
    assert isinstance(model.up, Adapted) and isinstance(model.embed, Adapted)
    made.bank.clear(1)
    assert type(model.embed) is nn.Embedding and type(model.head) is nn.Linear
    assert isinstance(model.up, Adapted)
    made.bank.clear(0)
    assert type(model.up) is nn.Linear and not model.up._modules
    assert made.bank.bytes == 0 and not made.bank.placed


def test_closing_a_bank_gives_the_model_back():
    model = toy()
    before = {name: id(p) for name, p in model.named_parameters()}
    made = mix(model, *KINDS.values())
    made.bank.close()
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not any(isinstance(module, Adapted) for module in model.modules())
    lofi.add_adapter(model, SMALL)


@pytest.mark.parametrize("first", KINDS)
def test_the_next_adapter_of_a_slot_sees_nothing_of_the_one_before(first):
    made = mix(toy(), KINDS[first], slots=1)
    other = mix(toy(), lofi.LoraConfig(r=1, lora_alpha=2, target_modules=["up", "down", "embed"]))
    made.bank.place(other.packed[0], 0)
    assert close(made.batch(ids(), [0, 0, -1]), other.alone(ids(), [0, 0, -1]))


@pytest.mark.parametrize("first", KINDS)
def test_a_cleared_slot_leaves_nothing_at_modules_that_others_still_adapt(first):
    made = mix(toy(), KINDS[first], KINDS[first], slots=3)
    made.bank.clear(0)
    other = mix(toy(), lofi.LoraConfig(r=1, lora_alpha=2, target_modules=["head"]))
    made.bank.place(other.packed[0], 2)
    base = made.alone(ids(), [-1] * 3)
    assert torch.equal(made.batch(ids(), [0] * 3), base)
    made.bank.place(other.packed[0], 0)
    assert close(made.batch(ids(), [0, 1, 2])[[0, 2]], other.alone(ids(), [0] * 3)[[0, 2]])
    assert close(made.batch(ids(), [0, 1, 2])[1], made.alone(ids(), [1] * 3)[1])


def test_a_larger_rank_moves_no_adapter_that_was_there():
    made = mix(toy(), SMALL, EMBED, slots=3)
    before = made.batch(ids(), [0, 1, -1])
    lofi.add_adapter(made.twin, lofi.LoraConfig(r=19, lora_alpha=3, target_modules=["up", "down", "embed"]), "a2")
    stir(made.twin, "a2", 9)
    with torch.inference_mode():
        made.bank.place(pack(made.twin, "a2"), 2)
    assert close(made.batch(ids(), [0, 1, -1]), before)
    assert close(made.batch(ids(), [2, 0, 1]), made.alone(ids(), [2, 0, 1]))
    made.bank.place(made.packed[0], 2)  # outside of inference mode, into stacks that grew inside


def test_as_many_products_are_asked_for_with_one_adapter_as_with_eight():
    counts = []
    for adapters in (1, 8):
        product = Counting()
        made = mix(toy(), *[SMALL] * adapters, product=product)
        made.batch(ids(), [0, adapters - 1, -1])
        counts.append(product.calls)
    assert counts == [2, 2]


def test_the_stacks_take_what_their_slots_and_the_largest_rank_say():
    made = mix(toy(), SMALL, WIDE, slots=4)
    up, down = 4 * 8 * (7 + 13) * 4, 4 * 3 * (13 + 5) * 4
    assert made.bank.bytes == up + down + 2 * 4 * 4  # and the ranks


# -- errors -----------------------------------------------------------------------------------------------------------


def test_a_module_that_sees_other_tokens_than_the_route_is_an_error_that_names_it():
    made = mix(toy(), SMALL)
    route = made.bank.routed(torch.zeros(14, dtype=torch.int32))
    told = "up got 15 tokens but the batch says an adapter for 14: give a slot"
    with torch.no_grad(), pytest.raises(TargetError, match=told), route:
        made.model(ids())


def test_logits_of_fewer_tokens_than_the_route_are_an_error_where_the_head_has_an_adapter():
    made = mix(family_model("llama_tied"), lofi.LoraConfig(r=2, trainable_token_indices=[4]))
    route = made.bank.routed(torch.zeros(36, dtype=torch.int32))
    told = "lm_head got 4 tokens but the batch says an adapter for 36"
    with torch.no_grad(), pytest.raises(TargetError, match=told), route:
        made.model(prompts(), logits_to_keep=1)


@pytest.mark.parametrize(
    ("slots", "told"),
    [
        (torch.zeros(15, dtype=torch.int64), "give one int32 a token"),
        (torch.zeros(3, 5, dtype=torch.int32), "give one int32 a token"),
        (torch.full((15,), 2, dtype=torch.int32), "slots go from 2 to 2; this bank has 0 to 1"),
        (torch.full((15,), -2, dtype=torch.int32), "slots go from -2 to -2"),
    ],
)
def test_a_route_that_is_none_is_an_error(slots, told):
    made = mix(toy(), SMALL, WIDE)
    with pytest.raises(TargetError, match=told), made.bank.routed(slots):
        pass


def test_a_bank_does_not_train():
    made = mix(toy(), SMALL)
    route = made.bank.routed(torch.zeros(15, dtype=torch.int32))
    with pytest.raises(TargetError, match="a bank does not train, but up wants a gradient"), route:
        made.model(ids())


def test_an_adapter_of_another_base_leaves_the_bank_as_it_was():
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(7, 13), nn.Linear(13, 6)

    other = Other()
    lofi.add_adapter(other, lofi.LoraConfig(r=2, target_modules=["up", "down"]))
    made = mix(toy(), SMALL)
    before = made.batch(ids(), [0, 0, 0])
    with pytest.raises(
        TargetError, match=r"down is \(5, 13\), the adapter's is \(6, 13\); place adapters of this base"
    ):
        made.bank.place(pack(other), 0)
    assert torch.equal(made.batch(ids(), [0, 0, 0]), before)
    del made.model.down
    with pytest.raises(TargetError, match="the base has no module down"):
        made.bank.place(made.packed[0], 0)


def test_a_slot_that_there_is_not_is_an_error():
    made = mix(toy(), SMALL)
    with pytest.raises(TargetError, match="there is no slot 1 in a bank of 1; give 0 to 0"):
        made.bank.place(made.packed[0], 1)
    with pytest.raises(TargetError, match="a bank of 0 slots holds no adapter"):
        AdapterBank(toy(), slots=0)


def test_running_out_of_memory_leaves_no_half_of_an_adapter():
    class Failing:
        name = "failing"

        def prepare(self, a, b, ranks):
            if a.shape[2] == 13:
                raise MemoryError
            return PLAIN.prepare(a, b, ranks)

    made = mix(toy(), product=Failing(), slots=1)
    beside = twin(toy())
    lofi.add_adapter(beside, SMALL)
    with pytest.raises(MemoryError):
        made.bank.place(pack(beside), 0)
    assert not made.bank.placed and not isinstance(made.model.up, Adapted) and not isinstance(made.model.down, Adapted)


def test_a_model_has_adapters_of_its_own_or_a_bank_and_never_both():
    model = toy()
    lofi.add_adapter(model, SMALL)
    with pytest.raises(TargetError, match="the model already has adapters or a bank"):
        AdapterBank(model, slots=1)
    made = mix(toy(), SMALL)
    with pytest.raises(TargetError, match="the model already has adapters or a bank"):
        AdapterBank(made.model, slots=1)
    with pytest.raises(TargetError, match="the model serves adapters from a bank; put this one on its twin"):
        lofi.add_adapter(made.model, SMALL)


# -- whole models -----------------------------------------------------------------------------------------------------


def whole(family: str, **changes) -> Mix:
    """A family's model with three adapters: every linear, a part of them with DoRA, and rows of some tokens."""
    return mix(
        quantized(family_model(family), changes.pop("kind")) if "kind" in changes else family_model(family),
        lofi.LoraConfig(r=5, lora_alpha=9),
        lofi.LoraConfig(r=2, lora_alpha=3, target_modules=changes["some"], use_dora=True),
        lofi.LoraConfig(r=3, lora_alpha=7, trainable_token_indices=[4, 9, 11]),
        lofi.LoraConfig(r=1, lora_alpha=2, target_modules=changes["some"], trainable_token_indices=[9]),
    )


@pytest.mark.parametrize(
    ("family", "some"),
    [
        ("llama_tied", ["q_proj", "v_proj"]), ("gemma", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"]),
        ("mixtral", ["q_proj", "o_proj"]), ("phi", ["dense"]),
    ],
)  # fmt: skip
def test_rows_of_whole_models_mix_adapters(family, some):
    made = whole(family, some=some)
    rows, slots = prompts(6), [2, 0, -1, 1, 3, 2]
    rows[:, 2:5] = torch.tensor([4, 9, 11])
    assert close(made.batch(rows, slots), made.alone(rows, slots), 2e-6)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_rows_mix_adapters_on_quantized_bases(kind):
    made = whole("llama_tied", some=["q_proj", "v_proj"], kind=kind)
    rows, slots = prompts(6), [2, 0, -1, 1, 3, 2]
    got, wanted = made.batch(rows, slots), made.alone(rows, slots)
    assert close(got, wanted, 1e-2)  # products of codes are in bf16: one step there is 4e-3
    assert not close(wanted[:2], made.alone(rows, [-1] * 6)[:2], 0.1)
    assert torch.equal(got[2], made.alone(rows, [-1] * 6)[2])


def test_the_trained_rows_of_a_tied_head_speak_for_their_own_adapter_alone():
    made = mix(
        family_model("llama_tied"),
        lofi.LoraConfig(r=1, target_modules=["q_proj"], trainable_token_indices=[4, 9]),
        lofi.LoraConfig(r=1, target_modules=["q_proj"], trainable_token_indices=[0]),
    )
    base, got = made.batch(prompts(3), [-1] * 3), made.batch(prompts(3), [0, 1, -1])
    moved = [(got[n] - base[n]).abs().amax(0) > 1e-2 for n in range(3)]
    assert moved[0][[4, 9]].all() and moved[1][0] and not moved[2].any()
    assert torch.equal(got[2], base[2])


def test_rows_of_gemmas_embedding_are_scaled_as_the_module_scales_its_own():
    made = mix(family_model("gemma"), lofi.LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"]))
    assert close(made.batch(prompts(), [0, -1, 0, 0]), made.alone(prompts(), [0, -1, 0, 0]), 2e-6)


def test_bf16_is_as_near_to_exact_arithmetic_as_the_ordinary_layer():
    made = mix(toy(dtype=torch.bfloat16), lofi.LoraConfig(r=8, lora_alpha=20, target_modules=["up"]), size=0.5)
    part = made.twin.lofi_registry.adapters["a0"].parts["up"]
    x = torch.randn(64, 7, generator=torch.Generator().manual_seed(4)).bfloat16()
    wide, low = x.double(), part.delta_weight().double()
    exact = wide @ (made.model.up.weight.double() + low).t() + made.model.up.bias.double()
    with torch.no_grad(), made.bank.routed(torch.zeros(64, dtype=torch.int32)), using(made.twin, "a0"):
        ours, ordinary = made.model.up(x).double(), made.twin.up(x).double()
    bound = 2**-8 * (exact.abs() + (wide @ made.model.up.weight.double().t()).abs()) + 3 * 2**-8 * (
        wide.abs() @ (part.lora_A.double().abs().t() @ part.lora_B.double().abs().t()) * part.scale
    )
    assert bool(((ours - exact).abs() <= bound).all())
    assert (ours - exact).norm() <= 1.1 * (ordinary - exact).norm()


def test_input_in_another_dtype_than_the_base_is_multiplied_in_the_bases():
    made = mix(toy(dtype=torch.bfloat16), lofi.LoraConfig(r=4, lora_alpha=9, target_modules=["up"]))
    made.model.up.float()
    made.twin.up.float()
    x = torch.randn(5, 7)
    with torch.no_grad(), made.bank.routed(torch.zeros(5, dtype=torch.int32)), using(made.twin, "a0"):
        assert close(made.model.up(x), made.twin.up(x), 1e-2) and made.model.up(x).dtype == torch.float32
