"""The cache of compiled engines: nothing is believed that its MAC does not cover, and it stays within its bounds."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_inference.engine_cache import (
    MAGIC,
    SUFFIX,
    EngineCache,
    NotBelieved,
    Plan,
    PlanKey,
    load_key,
    model_digest,
    opened,
    sealed,
)
from mlmesh_inference.engines.base import EngineError
from mlmesh_inference.engines.tensorrt_compile import PlanFacts

SECRET, OTHER = b"k" * 32, b"o" * 32
KEY = PlanKey(
    model="0" * 64,
    flavour="tensorrt_rtx",
    version="1.7",
    target="default capabilities",
    profiles="rows 1..64@8",
    precision="as the model says",
)


def plan(data: bytes = b"machine code", key: PlanKey = KEY) -> Plan:
    facts = PlanFacts(
        size=len(data), sha256=hashlib.sha256(data).hexdigest(), precisions=("fp16",), profiles=3, seconds=1.5
    )
    return Plan(key=key, facts=facts, data=data, source="built")


def cache(root: Path, *, secret: bytes = SECRET, bytes_max: int = 1 << 20) -> EngineCache:
    return EngineCache(root, secret, bytes_max=bytes_max)


def file_of(root: Path, key: PlanKey = KEY) -> Path:
    return root / (key.digest + SUFFIX)


def test_what_was_put_comes_back_also_in_another_process(tmp_path: Path) -> None:
    cache(tmp_path).put(plan())
    again = cache(tmp_path)
    found = again.get(KEY)
    assert found is not None
    assert (bytes(found.data), found.facts, found.source) == (b"machine code", plan().facts, "cache")
    assert (again.counts.hits, again.counts.misses) == (1, 0)
    assert [path.name for path in tmp_path.iterdir()] == [file_of(tmp_path).name]


@pytest.mark.parametrize("field", list(PlanKey.__dataclass_fields__))
def test_another_value_of_any_part_of_the_key_is_another_engine(field: str, tmp_path: Path) -> None:
    here = cache(tmp_path)
    here.put(plan())
    assert here.get(replace(KEY, **{field: "other"})) is None


def test_an_entry_under_another_ones_name_is_not_believed(tmp_path: Path) -> None:
    """It has a MAC that holds: whoever can rename files must not make one model answer for another."""
    here, other = cache(tmp_path), replace(KEY, model="1" * 64)
    here.put(plan())
    file_of(tmp_path).rename(file_of(tmp_path, other))
    assert here.get(other) is None
    assert here.counts.refused == 1
    assert list(tmp_path.iterdir()) == []


@given(data=st.data())
def test_not_one_bit_may_change_and_not_one_byte_lack(data: st.DataObject) -> None:
    good = sealed(plan(), SECRET)
    place = data.draw(st.integers(0, len(good) - 1))
    flipped = bytearray(good)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    for bad in (bytes(flipped), good[:place], good + b"x", good[place:] if place else b""):
        with pytest.raises(NotBelieved, match="MAC does not hold"):
            opened(bad, SECRET, KEY, source="cache")


def test_an_engine_of_a_stranger_is_not_believed_is_removed_and_counted(tmp_path: Path) -> None:
    cache(tmp_path, secret=OTHER).put(plan(b"a stranger's code"))
    told: list[str] = []
    here = EngineCache(tmp_path, SECRET, bytes_max=1 << 20, refused=told.append)
    assert here.get(KEY) is None
    assert here.counts.refused == 1
    assert told == ["its MAC does not hold: it is cut, changed, or made with another key"]
    assert not file_of(tmp_path).exists()


def test_bytes_with_a_mac_but_of_another_format_are_not_believed() -> None:
    import hmac

    for body in (MAGIC, MAGIC + b"\xff\xff\xff\xff", b"mlmesh engine 2\n" + bytes(100), MAGIC + b"\x02\0\0\0[]"):
        with pytest.raises(NotBelieved):
            opened(body + hmac.digest(SECRET, body, "sha256"), SECRET, KEY, source="cache")


def test_the_longest_unused_makes_room(tmp_path: Path) -> None:
    keys = [replace(KEY, model=f"{number:064}") for number in range(4)]
    size = len(sealed(plan(key=keys[0]), SECRET))
    here = cache(tmp_path, bytes_max=3 * size)
    for at, key in enumerate(keys[:3]):
        here.put(plan(key=key))
        os.utime(file_of(tmp_path, key), (at, at))
    assert here.get(keys[0]) is not None
    here.put(plan(key=keys[3]))
    assert set(here.entries()) == {key.digest for key in (keys[0], keys[2], keys[3])}
    assert here.counts.evicted == 1


def test_one_that_is_larger_than_the_cache_is_not_kept_and_drives_nothing_out(tmp_path: Path) -> None:
    size = len(sealed(plan(), SECRET))
    here = cache(tmp_path, bytes_max=size)
    here.put(plan())
    here.put(plan(b"x" * 2 * size, replace(KEY, model="1" * 64)))
    assert list(here.entries()) == [KEY.digest]


def test_what_a_cut_write_left_is_swept_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "half.part").write_bytes(b"half")
    cache(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_generated_key_is_its_owners_alone_and_stays(tmp_path: Path) -> None:
    path = tmp_path / "made" / "key"
    key = load_key(path, generate=True)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_key(path, generate=True) == key
    assert list(path.parent.iterdir()) == [path]


def test_keys_that_prove_nothing_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with pytest.raises(EngineError, match="cannot be read"):
        load_key(path, generate=False)
    path.write_bytes(b"short")
    with pytest.raises(EngineError, match="holds 5 bytes; a key has 32"):
        load_key(path, generate=False)
    path.write_bytes(b"x" * 32)
    path.chmod(0o640)
    assert load_key(path, generate=False) == b"x" * 32, "a mounted secret's mode is its owner's choice"
    with pytest.raises(EngineError, match="others may read"):
        load_key(path, generate=True)


def test_the_digest_covers_weights_beside_the_model_and_nothing_else(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"graph")
    alone = model_digest(model)
    assert alone == hashlib.sha256(b"graph").hexdigest()
    (tmp_path / "labels.txt").write_text("a")
    (tmp_path / "config.pbtxt").write_text("b")
    assert model_digest(model) == alone
    weights = tmp_path / "weights" / "w.bin"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    first = model_digest(model)
    weights.write_bytes(b"2")
    assert len({alone, first, model_digest(model)}) == 3
