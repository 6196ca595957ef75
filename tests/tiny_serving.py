"""What the engine's tests share: random decoders of several families, a tokenizer, adapters, a shelf for a store."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch

V = 61
_SHARED = {
    "vocab_size": V, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 96,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.25,
}  # fmt: skip
_GROUPED = _SHARED | {"intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6}
_FAMILIES = {
    "llama": ("Llama", _GROUPED),
    "qwen3": ("Qwen3", _GROUPED),
    "gpt2": ("GPT2", {"vocab_size": V, "n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 96,
                      "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.25}),
    "gemma3": ("Gemma3", _GROUPED | {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"] * 2,
                                     "num_hidden_layers": 4, "query_pre_attn_scalar": 6}),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": 5}),
    "neox": ("GPTNeoX", _SHARED | {"intermediate_size": 40}),
    "opt": ("OPT", _SHARED | {"ffn_dim": 40, "word_embed_proj_dim": 24}),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


def decoder(family: str = "llama", *, seed: int = 0, attention: str = "sdpa", **changes):
    """A random decoder (V 61, D 24, 96 positions) whose weights are large enough for attention to matter."""
    import transformers

    name, settings = _FAMILIES[family]
    torch.manual_seed(seed)
    config_class = getattr(transformers, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")
    config = config_class(**settings, attn_implementation=attention, **changes)
    model_class = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    return getattr(transformers, model_class)(config).eval()


def tokenizer():
    """One word a token: "w0 w1 ... w60" joined by spaces, the first three special."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", bos_token="w1", eos_token="w2")


def with_adapters(model, *, count: int = 3, targets=("q_proj", "v_proj", "o_proj")):
    """A twin of the model that has adapters a0, a1, ... of ranks 2, 3, ... and random factors."""
    import lofi
    from lofi.adapters.registry import adapter_tensors
    from lofi.adapters.twin import twin

    other = twin(model)
    for i in range(count):
        chosen = list(targets) if i % 2 == 0 else list(targets)[:2]
        lofi.add_adapter(other, lofi.LoraConfig(r=2 + i, lora_alpha=5, target_modules=chosen), name=f"a{i}")
        generator = torch.Generator().manual_seed(40 + i)
        with torch.no_grad():
            for tensor in adapter_tensors(other, f"a{i}").values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return other.eval()


class Shelf:
    """A store as the engine needs it: adapters of a twin in the slots of a bank, least recently used out first."""

    def __init__(self, model, adapted, *, slots: int) -> None:
        from lofi.adapters.batched import AdapterBank, pack
        from lofi.adapters.registry import adapters_of

        self.bank = AdapterBank(model, slots=slots)
        self.packed = {name: pack(adapted, name) for name in adapters_of(adapted)}
        self.keys = {name: f"key of {name}" for name in self.packed}
        self.inside: dict[str, int] = {}
        self.leases: dict[str, int] = dict.fromkeys(self.packed, 0)

    def get(self, name):
        from lofi.serve.request import UnknownAdapter

        if name not in self.packed:
            raise UnknownAdapter(f"there is no adapter {name!r}")
        return SimpleNamespace(name=name, key=self.keys[name])

    def lease(self, name):
        self.get(name)
        if name not in self.inside:
            free = [slot for slot in range(self.bank.slots) if slot not in self.inside.values()]
            idle = [other for other in self.inside if not self.leases[other]]
            if not free and not idle:
                return None
            slot = free[0] if free else self.inside.pop(idle[0])
            self.bank.place(self.packed[name], slot)
            self.inside[name] = slot
        self.leases[name] += 1
        return SimpleNamespace(slot=self.inside[name], key=self.keys[name], name=name)

    def release(self, lease):
        self.leases[lease.name] -= 1


class Heard:
    """Takes the pieces of one answer and holds them to what pieces must be."""

    def __init__(self) -> None:
        self.pieces: list = []

    def __call__(self, piece) -> None:
        assert not self.finish, "a piece came after the last one"
        self.pieces.append(piece)

    @property
    def finish(self):
        return self.pieces[-1].finish if self.pieces else None

    @property
    def error(self):
        return self.pieces[-1].error

    @property
    def ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.tokens]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def cached(self) -> int:
        return sum(piece.cached for piece in self.pieces)


def asks(count: int, *, seed: int, adapters=(None,), longest: int = 40, vocabulary: int = V) -> list:
    """Random requests: prompts of 1 to `longest` tokens, half of them with one of three beginnings, 1 to 20 tokens."""
    from lofi.serve.request import Asked

    dice = random.Random(seed)
    beginnings = [[dice.randrange(3, vocabulary) for _ in range(longest * 2 // 3)] for _ in range(3)]
    found = []
    for _ in range(count):
        length = dice.randint(1, longest)
        prompt = [dice.randrange(3, vocabulary) for _ in range(length)]
        if dice.random() < 0.5:
            prompt = [*dice.choice(beginnings), *prompt[: longest // 3]]
        asked = Asked(
            prompt=tuple(prompt), adapter=dice.choice(list(adapters)), max_tokens=dice.randint(1, 20), stop_ids=(2,)
        )
        found.append(asked)
    return found


def alone(model, asked) -> list[int]:
    """What `generate` answers to this request alone, greedily, the stop token included."""
    from lofi.adapters.registry import adapters_of
    from lofi.adapters.switch import using

    prompt = torch.tensor([asked.prompt])
    given = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": asked.max_tokens, "do_sample": False}
    given |= {"eos_token_id": list(asked.stop_ids) or None, "pad_token_id": 0, "repetition_penalty": 1.0}
    if not adapters_of(model):
        return model.generate(prompt, **given)[0, prompt.shape[1] :].tolist()
    with using(model, asked.adapter):
        return model.generate(prompt, **given)[0, prompt.shape[1] :].tolist()


def run(engine, requests, *, arrive=None, after_step=None) -> list[Heard]:
    """Submit the requests, `arrive(step)` of them before each step (None: all at once), and step until all ended."""
    heard = [Heard() for _ in requests]
    waiting = list(zip(requests, heard, strict=True))
    step = 0
    while waiting or not all(one.finish for one in heard):
        for _ in range(len(waiting) if arrive is None else arrive(step)):
            if waiting:
                engine.submit(*waiting.pop(0))
        engine.step()
        if after_step is not None:
            after_step(step)
        step += 1
        assert step < 5000, "the engine does not come to an end"
    return heard
