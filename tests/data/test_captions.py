"""Captions from templates: they read well or are not made."""

import pytest

from ldm.data.captions import clean, own_captions, read_templates
from ldm.errors import UserError


def fill(template: str, **columns: object) -> str:
    return read_templates([template], [])[0].fill(columns)


@pytest.mark.parametrize(
    "template, columns, expected",
    [
        ("a {colour} {name}", {"colour": "red", "name": "apple"}, "a red apple"),
        ("a {name}", {"name": "apple"}, "an apple"),
        ("a photo of a {colour} {name}", {"colour": "orange", "name": "t-shirt"}, "a photo of an orange t-shirt"),
        ("a {name}", {"name": "unicorn"}, "a unicorn"),
        ("a {name}", {"name": "umbrella"}, "an umbrella"),
        ("{name}, 3d emoji", {"name": "old   key "}, "old key, 3d emoji"),
        ("a photo of sks dog", {}, "a photo of sks dog"),
        ("photo: {name}", {"name": "dog"}, "photo: dog"),
        ("{size} px", {"size": 64}, "64 px"),
        # a column that is missing or empty
        ("a {colour} {name}", {"name": "apple"}, ""),
        ("a {colour} {name}", {"colour": "", "name": "apple"}, ""),
        ("a {colour} {name}", {"colour": None, "name": "apple"}, ""),
        # names that are phrases already
        ("a {colour} {name}", {"colour": "blue", "name": "a satellite image of a river"}, ""),
        ("a {colour} {name}", {"colour": "blue", "name": "pixel art of a glove"}, ""),
        ("{colour} {name}", {"colour": "blue", "name": "flag: Fiji"}, ""),
        # two colours
        ("{colour} {name}", {"colour": "red", "name": "brown heart"}, ""),
        ("{colour} {name}", {"colour": "red", "name": "greenhouse"}, "red greenhouse"),
        # one of many
        ("a {colour} {name}", {"colour": "pink", "name": "shoes"}, ""),
        ("{colour} {name}", {"colour": "pink", "name": "shoes"}, "pink shoes"),
        ("a {name}", {"name": "glass"}, "a glass"),
        ("a {name}", {"name": "bus"}, "a bus"),
    ],
)
def test_templates(template, columns, expected):
    assert fill(template, **columns) == expected


def test_a_template_of_one_source():
    (template,) = read_templates(["emoji:a {name}, 3d"], ["emoji", "photos"])
    assert (template.source, template.text) == ("emoji", "a {name}, 3d")


@pytest.mark.parametrize(
    "template, message",
    [
        ("emojy:a {name}", r"no source is called 'emojy', .*did you mean 'emoji'"),
        ("a {name", "cannot be read"),
        ("a {}", "needs plain column names"),
        ("a {name.__class__}", "needs plain column names"),
    ],
)
def test_templates_that_cannot_work_are_refused(template, message):
    with pytest.raises(UserError, match=message):
        read_templates([template], ["emoji"])


def test_own_captions_are_cleaned_and_each_is_kept_once():
    columns = {"captions": [" a\ncat ", "", "a cat", "tabby", "pet"]}
    assert own_captions(columns) == ["a cat", "tabby", "pet"]
    assert clean("\t ") == ""
