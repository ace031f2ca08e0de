"""Settings: one place of declaration, checked values, errors that help."""

from __future__ import annotations

import pytest

from sattile import config, legend
from sattile.config import Option
from sattile.errors import UsageError


def example(spark, *, out: str, size: int = 256, rate: float | None = None, names: list[str] | None = None,
            fast: bool = False, band: str | list[str] | None = None) -> str:  # fmt: skip
    """Do it.

    Args:
        out: where it
            goes.
        size: edge in pixels.

    Returns:
        Nothing.
    """
    return out


def test_options_are_the_functions_parameters():
    assert config.options_of(example) == [
        Option("out", "str", None, True, "where it goes."),
        Option("size", "int", 256, False, "edge in pixels."),
        Option("rate", "float", None, False, ""),
        Option("names", "list", None, False, ""),
        Option("fast", "bool", False, False, ""),
        Option("band", "str", None, False, ""),
    ]


@pytest.mark.parametrize("name", list(config.COMMANDS))
def test_every_option_of_every_command_is_explained(name):
    unexplained = [option.name for option in config.COMMANDS[name].options() if not option.help]
    assert not unexplained


def test_file_and_assignments_are_merged(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("max_failed_fraction: 0.2\ntile: {size: 64, ignore: [0, 99]}\nspark: {spark.ui.enabled: false}\n")
    found = config.load(str(path), ["tile.stride=32", "master=local[2]", "tile.size=128"])
    assert found == {
        "max_failed_fraction": 0.2,
        "tile": {"size": 128, "ignore": "0,99", "stride": 32},
        "spark": {"spark.ui.enabled": False},
        "master": "local[2]",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tile: {sise: 64}", r"tile\.sise is no setting; did you mean tile\.size\?"),
        ("tiles: {size: 64}", "tiles is no setting; did you mean tile"),
        ("tile: {size: big}", "size 'big' is no int"),
        ("tile: {size: 1.5}", "size 1.5 is no int"),
        ("tile: 5", "tile is a section"),
        ("- a", "give sections"),
        ("a: [", "is not YAML"),
        ("predict: {out: 2026-13-45}", "is not YAML"),
        ("yes: 1", "True is no setting"),
        ("train: {on: 2}", r"train\.True is no setting"),
        ("tile: {classes: [no, yes]}", r"classes \[False, True\] is no str; put words such as yes, no"),
        ("tile: {labels: {a: 1}}", "is no str"),
        ("train: {learning_rate: true}", "learning_rate True is no float"),
        ("max_failed_fraction: true", "max_failed_fraction True is no float"),
        ("verbose: 'no'", "verbose 'no' is no bool"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        config.load(str(path))


def test_nothing_behind_a_colon_is_not_set(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train:\nmaster:\nspark:\npredict:\n  sieve:\n  size:\n")
    assert config.load(str(path)) == {"train": {}, "predict": {"size": None}}  # `size` has a word for it


def test_an_assignment_without_a_value_is_refused():
    with pytest.raises(UsageError, match=r"section\.name=value"):
        config.load(None, ["train.epochs"])


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("index.pattern={scene}, {band}.tiff", "{scene}, {band}.tiff"),
        ("index.pattern={scene}_{band}.tif", "{scene}_{band}.tif"),
        ("tile.labels=no", "no"),
        ("tile.classes=007=1,no=0", "007=1,no=0"),
        ("tile.ignore=[0, 99]", "0,99"),
        ("index.scenes=[a.tif, b.tif]", ["a.tif", "b.tif"]),
        ("index.scenes=2024", ["2024"]),
        ("tile.aoi=null", None),
        ("tile.nodata=-1e3", -1000.0),
    ],
)
def test_words_of_an_assignment_stay_words(assignment, value):
    section, _, rest = assignment.partition(".")
    assert config.load(None, [assignment]) == {section: {rest.partition("=")[0]: value}}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epochs=.inf", "epochs inf is no int"),
        ("train.epochs=[1", r"epochs '\[1' is no int"),
        ("epochs=3", r"epochs is no setting; did you mean train\.epochs\?"),
        ("run.settings={}", r"run\.settings is no setting"),
    ],
)
def test_a_wrong_assignment_is_named(assignment, message):
    with pytest.raises(UsageError, match=message):
        config.load(None, [assignment])


def test_a_settings_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "picture", "is not YAML"), (tmp_path / "no", "exist")):
        with pytest.raises(UsageError, match=message):
            config.load(str(path))


def test_an_item_with_a_comma_stays_one_item(tmp_path):
    (tmp_path / "c.yaml").write_text(
        'tile: {ignore: ["Forest, dense", 7], classes: ["f=Forest, open", "water"], bands: [a, b]}'
    )
    found = config.load(str(tmp_path / "c.yaml"), [])["tile"]
    assert found["ignore"] == '"Forest, dense",7'
    assert [one.name for one in legend.parse_classes(found["classes"]) or ()] == ["f", "water"]
    assert legend.parse_values(found["ignore"]) == [7, "Forest, dense"]
    assert found["bands"] == "a,b"
