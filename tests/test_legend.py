"""Which value of a label file is which class: the same rules for numbers and texts, rasters and vectors."""

from __future__ import annotations

import shlex

import numpy as np
import pytest

from sattile import legend
from sattile.errors import Refused, UsageError
from sattile.legend import Legend
from sattile.schema import IGNORE, SegmentClass, describe_classes, read_classes


def said(classes: tuple[SegmentClass, ...] | None) -> list[tuple[int, str, object]]:
    return [(one.id, one.name, one.value) for one in classes or ()]


@pytest.mark.parametrize(
    ("stored", "value"),
    [
        (np.uint8(7), 7), (3.0, 3), ("01", 1), ("-1", -1), ("2.50", 2.5), (np.float32(0.1), 0.1), ("1e3", "1e3"),
        ("1e-05", 1e-05),        (np.float32(-3.4028235e38), -3.4028235e38), (2**53 + 1, 2**53 + 1),
        (np.int64(2**53 + 1), 2**53 + 1),
        (" water ", "water"), ("Wa\u0308lder", "W\u00e4lder"), ("", None), (None, None), (float("nan"), None),
        (True, "True"), (np.int64(1 << 40), 1 << 40), ("²", "²"),
    ],
)  # fmt: skip
def test_a_stored_value_has_one_form(stored, value):
    found = legend.value_of(stored)
    assert found == value
    assert type(found) is type(value)


def test_numbers_that_can_be_stay_ids_and_the_others_get_free_ones():
    values = ["urban", 2, 255, "Acker", 1, -1, 2.5, 1000, 111]
    assert legend.assign_ids(values) == {1: 1, 2: 2, 111: 111, -1: 0, 2.5: 3, 255: 4, 1000: 5, "Acker": 6, "urban": 7}
    assert legend.assign_ids(reversed(values)) == legend.assign_ids(values)
    assert legend.assign_ids(["b", "a"]) == {"a": 0, "b": 1}
    with pytest.raises(UsageError, match="300 different values"):
        legend.assign_ids(range(-300, 0))


def test_classes_that_nobody_named():
    assert said(legend.classes_of(["water", "land"])) == [(0, "land", None), (1, "water", None)]
    # Among numbers the text keeps its value: its id is none.
    assert said(legend.classes_of([1, 2, "class_1"])) == [
        (0, "class_1_", "class_1"), (1, "class_1", None), (2, "class_2", None),
    ]  # fmt: skip
    assert said(legend.classes_of([255, 1])) == [(0, "class_255", 255), (1, "class_1", None)]


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("land,water", [(0, "land", None), (1, "water", None)]),
        ("water=1,land=2", [(1, "water", None), (2, "land", None)]),
        ("land=0,water=255", [(0, "land", None), (1, "water", 255)]),
        ("land=-1,water=1000,ice=0", [(0, "ice", None), (1, "land", -1), (2, "water", 1000)]),
        ("clouds=C,land=L=#102030,7", [(0, "clouds", "C"), (1, "land", "L"), (7, "class_7", None)]),
        ("0:land,2.5:peat", [(0, "land", None), (1, "peat", 2.5)]),
        ('"Forest, dense",Forest: open', [(0, "Forest, dense", None), (1, "Forest: open", None)]),
        ("water=#0000ff,land", [(0, "water", None), (1, "land", None)]),
    ],
)
def test_classes_as_people_write_them(text, classes):
    assert said(legend.parse_classes(text)) == classes
    stored = describe_classes(legend.parse_classes(text) or ())
    assert read_classes(stored) == legend.parse_classes(text)
    assert [one for one in stored if "value" in one] == [one for one in stored if one.get("value") is not None]


def test_a_name_shadows_no_value_and_a_value_no_id():
    classes = legend.parse_classes("2=#aabbcc,land=0,water=255,urban=water") or ()
    known = legend.lookup(classes)
    assert {one.name: one.id for one in classes} == {"class_2": 2, "land": 0, "water": 1, "urban": 3}
    assert known["water"] == 3  # the value of another class, not this one's name
    assert known[255] == 1
    assert 1 not in known  # the id of a class with a value of its own
    assert 3 not in known


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("water=1,land=2,wood=3", [3, 1, 2]),
        ("land=0,water=255", [0, 255]),
        ('a=-1,"b, c"=2.5', [-1, 2.5]),
        ("water,crops", ["water", "crops"]),
        ('a\\=b,1\\: Water,"say ""x"", y",\\#aabbcc,back\\\\slash', ["a=b", "1: Water"]),
        ('"two\nlines",a=-3.4028235e+38,b=1e-05', [-3.4028235e38]),
    ],
)
def test_the_line_that_a_message_gives_is_read_back(text, values):
    classes = legend.parse_classes(text) or ()
    option, line = shlex.split(legend.named_line(classes, values))
    assert option == "--classes"
    assert said(legend.parse_classes(line)) == said(classes)


def test_a_name_of_any_letters_can_be_named_and_ignored():
    names = [
        "a=b",
        "1: Water",
        '"q" z',
        'water, "deep"',
        "#aabbcc",
        "two\nlines",
        "50 %",
        "it's",
        "2.5:x",
        "\\",
        "\\=",
        "=",
        ":",
    ]
    option, line = shlex.split(legend.named_line(legend.parse_classes("land,water") or (), ["land", *names]))
    assert {one.name for one in legend.parse_classes(line) or ()} == {"land", "water", *names}
    option, line = shlex.split(legend.named_line(legend.parse_classes("land=0,water=255") or (), names[:5]))
    assert option == "--classes"
    assert {one.name for one in legend.parse_classes(line) or ()} == {"land", "water", *names[:5]}
    option, line = shlex.split(legend.ignore_line(names[:8]))
    assert option == "--ignore"
    assert set(legend.parse_values(line)) == set(names[:8])
    with pytest.raises(UsageError, match="double quotes"):
        legend.parse_classes("a\nb")
    with pytest.raises(UsageError, match="double quotes"):
        legend.parse_values("a\nb")


def test_the_line_keeps_the_ids_of_the_classes_that_there_are():
    def lined(text: str, *values: legend.Value) -> list[tuple[int, str, object]]:
        return said(legend.parse_classes(shlex.split(legend.named_line(legend.parse_classes(text) or (), values))[1]))

    assert lined("water,land", "water", "crops") == [(0, "water", None), (1, "land", None), (2, "crops", None)]
    assert lined("Sand=1,Cloud=7", "Sand", "Marsh, wet") == [
        (0, "Marsh, wet", None), (1, "Sand", None), (7, "Cloud", None),
    ]  # fmt: skip
    assert lined("a=0,b=255", 255, 9, -1) == [(0, "a", None), (1, "class_-1", -1), (2, "b", 255), (9, "class_9", None)]


def test_names_in_order_are_offered_to_as_many_values():
    classes = legend.parse_classes("water,land,wood") or ()
    assert legend.named_line(classes, [3, 1, 2]) == "--classes water=1,land=2,wood=3"
    assert legend.named_line(classes, [0, 1, 2, 7]) == "--classes water=0,land=1,wood=2,class_7=7"


def test_values_to_be_ignored():
    assert legend.parse_values("0,99,clouds,-9999") == [-9999, 0, 99, "clouds"]
    assert legend.parse_values(7) == [7]
    assert legend.parse_values([1, "2.5"]) == [1, 2.5]
    assert legend.parse_values(None) == legend.parse_values("") == []
    with pytest.raises(UsageError, match="ignore"):
        legend.parse_values("1,,2")


STORED = np.array([[1, 2, 1000, -1], [2, 2, 1, 99], [255, 1, 1, 2]], np.int16)
GOOD = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]], bool)


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
def test_numbers_of_any_type_become_ids(dtype):
    classes = legend.parse_classes("water=1,land=2,ice=1000,fire=-1")
    made = Legend("index", classes, (99,))
    ids, undeclared = made.ids(STORED.astype(dtype)[..., None], GOOD, "l.tif")
    # -1 and 1000 have the free ids 0 and 3.
    assert ids.tolist() == [[1, 2, 3, 0], [2, 2, 1, IGNORE], [IGNORE, IGNORE, 1, 2]]
    assert ids.dtype == np.uint8
    assert undeclared == 1  # the 255
    assert Legend("index", classes, (99, 255)).ids(STORED.astype(dtype)[..., None], GOOD, "l.tif")[1] == 0


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_a_value_that_is_no_class_is_refused_with_the_line_to_write(dtype):
    stored = np.array([[[0], [1], [9]]], dtype)
    made = Legend("index", legend.parse_classes("land,water"))
    with pytest.raises(Refused, match=r"hold value 9.*--classes land=0,water=1,class_9=9, or ignore it: --ignore 9"):
        made.ids(stored, np.ones((1, 3), bool), "l.tif")
    assert made.ids(stored, np.array([[1, 1, 0]], bool), "l.tif")[0].tolist() == [[0, 1, IGNORE]]


def test_whole_numbers_keep_all_their_digits():
    large = 2**53
    stored = np.array([[large], [large + 1], [-5]], np.int64)
    ids, _ = Legend("index", legend.classes_of([large, large + 1, -5])).ids(stored, np.ones(3, bool), "l.tif")
    assert ids.tolist() == [1, 2, 0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_tenth_is_a_tenth_in_any_float(dtype):
    made = Legend("index", legend.parse_classes("a=0.1,b=-3.4028235e+38"), (1e-05,))
    stored = np.array([[0.1], [-3.4028235e38], [1e-05]], dtype)
    assert made.ids(stored, np.ones(3, bool), "l.tif")[0].tolist() == [1, 0, IGNORE]
    with pytest.raises(Refused, match=r"hold value 0.7, .*--ignore 0.7"):
        made.ids(np.array([[0.7]], dtype), np.ones(1, bool), "l.tif")


def test_a_measurement_is_no_raster_of_classes():
    stored = np.arange(300, dtype=np.float32)[:, None] + 0.5
    with pytest.raises(Refused, match="300 values that are no class in one window alone"):
        Legend().ids(stored, np.ones(300, bool), "l.tif")


def test_a_models_classes_are_not_to_be_named():
    made = Legend("index", legend.parse_classes("land,water"), (), True)
    with pytest.raises(Refused) as told:
        made.ids(np.array([[7]], np.uint8), np.ones(1, bool), "l.tif")
    assert "--classes" not in told.value.reason
    assert "--ignore 7" in told.value.reason


def test_255_is_a_class_where_the_classes_say_so():
    stored = np.array([[[0], [255], [1]]], np.uint8)
    good = np.array([[1, 1, 0]], bool)
    ids, undeclared = Legend("index", legend.parse_classes("land=0,water=255")).ids(stored, good, "l.tif")
    assert (ids.tolist(), undeclared) == ([[0, 1, IGNORE]], 0)


def test_colours_are_classes():
    stored = np.array([[[0, 0, 255], [0, 255, 0]], [[0, 0, 0], [0, 0, 255]], [[0, 255, 0], [0, 0, 255]]], np.uint8)
    good = np.array([[1, 1], [1, 1], [0, 1]], bool)
    classes = legend.parse_classes("water=5=#0000FF,land=3=#00ff00")
    made = Legend("rgb", classes, ("#000000",))
    assert made.ids(stored, good, "l.tif")[0].tolist() == [[5, 3], [IGNORE, 5], [IGNORE, 5]]
    with pytest.raises(Refused, match=r"colours that are no class: #000000.*--ignore '#000000'"):
        Legend("rgb", classes).ids(stored, good, "l.tif")
    with pytest.raises(Refused, match="2 bands of uint8"):
        made.ids(stored[..., :2], good, "l.tif")


def test_a_band_for_each_class():
    stored = np.array([[[1, 0, 0], [0, 0, 7]], [[0, 0, 0], [0, 1, 0]], [[0, 1, 0], [1, 0, 0]]], np.int16)
    good = np.array([[1, 1], [1, 1], [0, 1]], bool)
    classes = legend.parse_classes("a=2,b=4,c=9")
    assert Legend("one-hot", classes).ids(stored, good, "l.tif")[0].tolist() == [[2, 9], [IGNORE, 4], [IGNORE, 2]]
    assert Legend("one-hot").ids(stored, good, "l.tif")[0].tolist() == [[0, 2], [IGNORE, 1], [IGNORE, 0]]
    with pytest.raises(Refused, match=r"3 bands .* for 2 classes"):
        Legend("one-hot", legend.parse_classes("a,b")).ids(stored, good, "l.tif")
    stored[0, 0] = 1
    with pytest.raises(Refused, match="1 pixels several classes"):
        Legend("one-hot", classes).ids(stored, good, "l.tif")
