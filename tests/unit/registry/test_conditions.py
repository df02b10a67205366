"""Gates as values: their stored form, and what is refused."""

import json
import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlmesh_registry.conditions import (
    Condition,
    DigestVerified,
    Gate,
    HeldAlias,
    MetricBounds,
    MetricNoWorse,
    SignatureCompatible,
    Signed,
    check_gates,
    gate_from,
    plain,
)
from mlmesh_runtime.errors import InvalidInput

FIGURES = st.floats(allow_nan=False, allow_infinity=False)
AGES = st.timedeltas(min_value=timedelta(), max_value=timedelta(days=10_000))
IDS = st.from_regex(r"[a-z][a-z0-9-]{0,62}", fullmatch=True)
METRICS = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1, max_size=128)
CONDITIONS: st.SearchStrategy[Condition] = st.one_of(
    st.builds(MetricBounds, metric=METRICS, min_value=st.none() | FIGURES, max_value=st.none()),
    st.builds(MetricNoWorse, metric=METRICS, lower_is_better=st.booleans(), tolerance=FIGURES.map(abs)),
    st.builds(SignatureCompatible),
    st.builds(DigestVerified, max_age=st.none() | AGES),
    st.builds(Signed, key_id=st.from_regex(r"[0-9a-f]{0,64}", fullmatch=True)),
    st.builds(HeldAlias, alias=IDS, min_age=AGES),
)
GATES = st.builds(Gate, id=IDS, aliases=st.lists(IDS, max_size=3).map(tuple), condition=CONDITIONS)


@given(GATES)
def test_a_stored_gate_is_the_same_gate(gate: Gate) -> None:
    assert gate_from(json.loads(json.dumps(plain(gate)))) == gate
    assert check_gates([gate]) == [gate]


@pytest.mark.parametrize(
    ("gate", "field"),
    [
        (Gate(id="A", condition=Signed()), "gates[0].id"),
        (Gate(id="a", aliases=("B",), condition=Signed()), "gates[0].aliases"),
        (Gate(id="a", condition=MetricBounds(metric="")), "gates[0].metric"),
        (Gate(id="a", condition=MetricBounds(metric="m" * 129)), "gates[0].metric"),
        (Gate(id="a", condition=MetricBounds(metric="m", min_value=math.inf)), "gates[0].metric_bounds"),
        (Gate(id="a", condition=MetricBounds(metric="m", min_value=2, max_value=1)), "gates[0].metric_bounds"),
        (Gate(id="a", condition=MetricNoWorse(metric="m", tolerance=-1)), "gates[0].tolerance"),
        (Gate(id="a", condition=MetricNoWorse(metric="m", tolerance=math.nan)), "gates[0].tolerance"),
        (Gate(id="a", condition=DigestVerified(max_age=timedelta(-1))), "gates[0]"),
        (Gate(id="a", condition=HeldAlias(alias="canary", min_age=timedelta(-1))), "gates[0]"),
        (Gate(id="a", condition=HeldAlias(alias="C")), "gates[0].held_alias.alias"),
        (Gate(id="a", condition=Signed(key_id="k" * 129)), "gates[0].signed.key_id"),
    ],
)
def test_what_is_no_gate_is_refused_by_its_field(gate: Gate, field: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        check_gates([gate])
    assert refused.value.field == field


def test_ids_are_unique_and_gates_are_few() -> None:
    with pytest.raises(InvalidInput, match="twice"):
        check_gates([Gate(id="a", condition=Signed()), Gate(id="a", condition=SignatureCompatible())])
    with pytest.raises(InvalidInput, match="at most 32"):
        check_gates([Gate(id=f"g{count}", condition=Signed()) for count in range(33)])
