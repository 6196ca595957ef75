"""The adapters there are: who is on the device, who leaves, who waits, and what another thread may do meanwhile."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading

import pytest
import torch
from tests.serve.adapters import base, saved

import lofi
from files.families import V
from lofi.adapters.batched import AdapterBank
from lofi.data.format import TextFormat
from lofi.errors import AdapterFileError, ProofError, RequestError
from lofi.serve.request import UnknownAdapter
from lofi.serve.store import AdapterStore


@pytest.fixture(scope="module")
def tokenizer(lofi_tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(lofi_tiny)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Four adapters of one base, with ranks 3 to 6."""
    top = tmp_path_factory.mktemp("adapters")
    return [saved(top / f"a{n}", seed=n, r=3 + n, golden=False) for n in range(4)]


@pytest.fixture
def make(tokenizer):
    def make(*given, slots=2, model=None, **more):
        model = base() if model is None else model
        store = AdapterStore(model, tokenizer, bank=AdapterBank(model, slots=slots), **more)
        for n, folder in enumerate(given):
            store.load(f"a{n}", folder)
        return store

    return make


def says(store, slot) -> torch.Tensor:
    ids = torch.randint(3, V, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), store.bank.routed(torch.full((9,), slot, dtype=torch.int32)):
        return store.bank.model(ids).logits


def alone(folder) -> torch.Tensor:
    model = base()
    lofi.load_adapter(model, folder)
    ids = torch.randint(3, V, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def same(one, other) -> bool:
    return torch.allclose(one, other, atol=1e-5)


def states(store) -> str:
    return " ".join(held.state for held in store.held())


def test_a_leased_adapter_speaks_from_its_slot(make, folders):
    store = make(*folders)
    for n in (3, 0):
        lease = store.lease(f"a{n}")
        assert same(says(store, lease.slot), alone(folders[n])) and lease.key == store.get(f"a{n}").key
    assert states(store) == "device host host device"


def test_an_adapter_that_is_resident_is_leased_again_in_the_same_slot(make, folders):
    store = make(*folders)
    first, second = store.lease("a0"), store.lease("a0")
    store.release(first)
    third = store.lease("a0")
    assert first.slot == second.slot == third.slot and len(store.bank.placed) == 1


def test_the_least_recently_used_adapter_that_nobody_leases_makes_room(make, folders):
    store = make(*folders)
    zero, one = store.lease("a0"), store.lease("a1")
    store.release(one)
    store.release(zero)
    assert store.lease("a2").slot == one.slot and states(store) == "device host device host"
    store.release(store.lease("a0"))
    kept = store.lease("a3")
    assert kept.slot == zero.slot and states(store) == "host host device device"
    assert same(says(store, kept.slot), alone(folders[3]))


def test_where_every_slot_is_leased_there_is_no_lease_until_one_is_back(make, folders):
    store = make(*folders)
    first, second = store.lease("a0"), store.lease("a1")
    assert store.lease("a2") is None and store.lease("a1").slot == second.slot
    store.release(first)
    assert store.lease("a2").slot == first.slot


def test_an_adapter_that_is_leased_again_is_no_longer_one_that_may_leave(make, folders):
    store = make(*folders, slots=1)
    store.release(store.lease("a0"))
    lease = store.lease("a0")
    assert store.lease("a1") is None and states(store) == "device host host host"
    assert same(says(store, lease.slot), alone(folders[0]))


def test_an_adapter_that_is_unloaded_serves_its_leases_to_the_end(make, folders):
    store = make(*folders)
    lease = store.lease("a0")
    store.unload("a0")
    assert [held.name for held in store.held()] == ["a1", "a2", "a3"]
    with pytest.raises(UnknownAdapter, match="there is no adapter 'a0'; 3 adapters are loaded"):
        store.lease("a0")
    assert same(says(store, lease.slot), alone(folders[0]))
    store.release(lease)
    assert lease.slot not in store.bank.placed
    assert {store.lease("a1").slot, store.lease("a2").slot} == {0, 1}


def test_what_is_unloaded_without_a_lease_frees_its_slot_and_its_memory(make, folders):
    store = make(*folders)
    for n in (0, 1):
        store.release(store.lease(f"a{n}"))
    used = store.host_used
    size = store.get("a0").bytes
    store.unload("a0")
    assert store.host_used == used - size
    store.release(store.lease("a1"))
    assert len(store.bank.placed) == 1  # cleared between two steps, not by the thread that unloads
    store.lease("a2")
    assert states(store) == "device device host"


def test_a_replaced_adapter_speaks_to_the_end_of_its_leases_and_the_new_one_to_the_rest(make, folders):
    store = make(*folders[:1])
    old = store.lease("a0")
    store.load("a0", folders[1], replace=True)
    new = store.lease("a0")
    assert new.slot != old.slot and new.key != old.key
    assert same(says(store, old.slot), alone(folders[0])) and same(says(store, new.slot), alone(folders[1]))
    store.release(old)
    assert store.lease("a0").slot == new.slot and len(store.held()) == 1


def test_host_copies_are_bounded_and_come_back_from_their_folder(make, folders):
    sizes = [make(folder).get("a0").bytes for folder in folders]
    store = make(*folders, host_bytes=sizes[2] + sizes[3])
    assert states(store) == "disk disk host host" and store.host_used == sizes[2] + sizes[3]
    lease = store.lease("a0")
    assert same(says(store, lease.slot), alone(folders[0]))
    assert states(store) == "device disk disk host" and store.host_used == sizes[0] + sizes[3]


def test_the_host_copy_that_was_not_used_for_longest_is_forgotten(make, folders):
    sizes = [make(folder).get("a0").bytes for folder in folders]
    store = make(*folders[:3], host_bytes=sum(sizes[:3]))
    store.lease("a0")
    store.lease("a1")
    store.load("a3", folders[3])
    assert states(store) == "device device disk host"


def test_without_host_memory_every_adapter_comes_from_its_folder(make, folders):
    store = make(*folders, host_bytes=0)
    assert states(store) == "disk disk disk disk" and store.host_used == 0
    for n in (2, 0, 1, 2):
        lease = store.lease(f"a{n}")
        assert same(says(store, lease.slot), alone(folders[n]))
        store.release(lease)


def test_a_folder_that_changed_since_its_proof_is_an_error_and_takes_no_slot(make, folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "a")
    store = make(folder, folders[1], host_bytes=0, slots=1)
    shutil.copy(folders[0] / "README.md", folder / "README.md")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(AdapterFileError, match="holds another adapter than the one that was admitted; load it again"):
        store.lease("a0")
    shutil.rmtree(folder)
    with pytest.raises(AdapterFileError, match="does not exist"):
        store.lease("a0")
    assert store.lease("a1").slot == 0


def test_what_is_refused_is_not_there_and_what_it_would_replace_stays(make, folders, tmp_path):
    store = make(*folders[:1])
    key = store.get("a0").key
    with pytest.raises(ProofError, match="was trained on another base"):
        store.load("a0", saved(tmp_path / "other", base(seed=1)), replace=True)
    with pytest.raises(AdapterFileError, match="does not exist"):
        store.load("b", tmp_path / "nothing")
    assert [held.name for held in store.held()] == ["a0"] and store.get("a0").key == key


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a b", "x" * 101, "é", "a\n"])
def test_a_name_that_is_none_is_refused(make, folders, name):
    with pytest.raises(RequestError, match="is no name for an adapter: use up to 100 letters"):
        make().load(name, folders[0])


def test_a_name_is_given_once(make, folders):
    with pytest.raises(RequestError, match="there is an adapter 'a0' already: unload it first"):
        make(folders[0]).load("a0", folders[1])


def test_of_two_loads_of_one_name_the_first_that_is_proved_has_it(make, folders):
    store = make()
    admit = store._admission.admit

    def slow(folder):
        store._admission.admit = admit
        store.load("a0", folders[1])
        return admit(folder)

    store._admission.admit = slow
    with pytest.raises(RequestError, match="there is an adapter 'a0' already"):
        store.load("a0", folders[0])
    assert store.get("a0").folder == folders[1] and len(store.held()) == 1


def test_a_name_that_nobody_has_is_an_error_with_the_nearest(make, folders):
    store = make()
    store.load("contracts", folders[0])
    for ask in (store.get, store.lease, store.unload):
        with pytest.raises(UnknownAdapter, match="there is no adapter 'contract'; did you mean 'contracts'"):
            ask("contract")
        with pytest.raises(UnknownAdapter, match="there is no adapter 'zzz'; 1 adapters are loaded"):
            ask("zzz")


def test_a_lease_is_released_once(make, folders):
    store = make(*folders[:1])
    lease = store.lease("a0")
    store.lease("a0")
    store.release(lease)
    with pytest.raises(RequestError, match="this lease was released before"):
        store.release(lease)
    assert store.lease("a0").slot == lease.slot


def test_a_bank_of_another_model_is_refused(tokenizer):
    with pytest.raises(RequestError, match="the bank belongs to another model"):
        AdapterStore(base(), tokenizer, bank=AdapterBank(base(), slots=1))


def test_what_is_held_says_what_it_is(make, folders, tokenizer):
    held = make(*folders[:1]).get("a0")
    assert (held.name, held.folder, held.rank, held.state) == ("a0", folders[0].absolute(), 3, "host")
    assert held.modules == ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert held.text_format == TextFormat.for_tokenizer(tokenizer) and held.bytes > 0
    assert [note for note in held.notes if "has no golden prompts" in note]
    with pytest.raises(dataclasses.FrozenInstanceError):
        held.name = "other"


def test_the_text_format_of_its_training_is_the_adapters_own(make, folders, tokenizer, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "a")
    record = json.loads((folder / "lofi.json").read_text())
    own = TextFormat.for_tokenizer(tokenizer).to_dict() | {"kind": "plain", "template": None, "separator": " => "}
    (folder / "lofi.json").write_text(
        json.dumps(record | {"text_format": own | {"stop_ids": [tokenizer.eos_token_id]}})
    )
    assert make(folder).get("a0").text_format.separator == " => "
    (folder / "lofi.json").write_text(json.dumps(record | {"text_format": own | {"eos_id": 77}}))
    with pytest.raises(AdapterFileError, match="this tokenizer is not the one the text format was made with"):
        make(folder)


def test_a_thousand_names_cost_their_names(make, folders):
    store = make(*folders[:2], host_bytes=0, slots=2)
    admitted = store._admission.admit(folders[0])
    store._admission.admit = lambda folder: admitted  # what a proof costs is measured elsewhere
    for n in range(1000):
        store.load(f"name{n}", folders[0])
    assert len(store.held()) == 1002 and store.host_used == 0 and store.bank.bytes == 0
    lease = store.lease("name999")
    assert same(says(store, lease.slot), alone(folders[0]))


def test_an_adapter_that_is_replaced_while_it_is_read_gives_way_to_the_new_one(make, folders):
    store = make(folders[0], host_bytes=0)
    read = store._admission.reread

    def slow(folder, key):
        if len(replaced) < 2:  # first another adapter comes, then the folder that is read is gone
            replaced.append(folder)
            store.load("a0", folders[len(replaced)], replace=True)
            if len(replaced) == 2:
                raise AdapterFileError("gone")
        return read(folder, key)

    replaced = []
    store._admission.reread = slow
    assert same(says(store, store.lease("a0").slot), alone(folders[2])) and len(store.bank.placed) == 1


def test_a_slot_that_is_given_up_while_an_adapter_is_read_is_that_adapters(make, folders):
    store = make(*folders[:2], host_bytes=0, slots=1)
    read = store._admission.reread
    store.release(store.lease("a0"))

    def slow(folder, key):
        store.unload("a0")
        return read(folder, key)

    store._admission.reread = slow
    assert same(says(store, store.lease("a1").slot), alone(folders[1]))


def test_a_device_without_room_for_an_adapter_loses_no_slot(make, folders):
    store = make(*folders[:1], slots=1)
    place = store.bank.place

    def full(packed, slot):
        raise MemoryError

    store.bank.place = full
    for _ in range(2):
        with pytest.raises(MemoryError):
            store.lease("a0")
    assert states(store) == "host"
    store.bank.place = place
    assert same(says(store, store.lease("a0").slot), alone(folders[0]))


def test_other_threads_load_and_unload_while_the_engines_thread_answers(make, folders):
    store = make(*folders, slots=2, host_bytes=60_000)
    wanted = [alone(folder) for folder in folders]
    stop, faults = threading.Event(), []

    def come_and_go() -> None:
        try:
            while not stop.is_set():
                store.load("guest", folders[1], replace=True)
                store.load("a3", folders[3], replace=True)
                store.unload("guest")
        except Exception as error:  # the test says so below
            faults.append(error)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for n in range(24):
            lease = store.lease(f"a{n % 4}")
            assert same(says(store, lease.slot), wanted[n % 4])
            store.release(lease)
    finally:
        stop.set()
        thread.join()
    assert not faults
    first, second = store.lease("a0"), store.lease("a1")
    assert {first.slot, second.slot} == {0, 1}  # no slot was lost
