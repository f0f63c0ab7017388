"""The shared data: no article twice, splits that are stratified and repeatable."""

from __future__ import annotations

from collections import Counter

import pytest
from bbc import Texts, drop_duplicates, load_bbc, squeeze, stratified_split


@pytest.fixture(scope="module")
def articles() -> Texts:
    return load_bbc()


def test_articles_are_all_there_once(articles: Texts) -> None:
    assert articles.classes == ["business", "entertainment", "politics", "sports", "tech"]
    assert len(articles) == 2089
    stories = Counter(squeeze(text.partition("\n")[2]) for text in articles.texts)
    assert stories.most_common(1)[0][1] == 1
    assert min(Counter(articles.labels).values()) > 300


@pytest.mark.parametrize(
    ("second", "kept"),
    [
        ("Title\n\nThe story.", 1),
        ("Title\n\n  The\tstory. \n", 1),
        ("Another title\nThe story.", 1),
        ("Title\n\nAnother story.", 2),
    ],
    ids=["exact", "white-space", "headline", "different"],
)
def test_duplicates_are_dropped(second: str, kept: int) -> None:
    data = Texts(["Title\n\nThe story.", second], [0, 0], ["a"])
    assert drop_duplicates(data).texts == data.texts[:kept]


def test_a_text_of_one_line_is_not_a_duplicate_of_every_other() -> None:
    data = Texts(["one line", "another line"], [0, 0], ["a"])
    assert len(drop_duplicates(data)) == 2


def test_split_is_a_stratified_partition(articles: Texts) -> None:
    parts = stratified_split(articles, 256, 200)
    assert [len(part) for part in parts] == [256, 200, 2089 - 456]
    assert sorted(text for part in parts for text in part.texts) == sorted(articles.texts)
    whole = Counter(articles.labels)
    label_of = dict(zip(articles.texts, articles.labels))
    for part in parts:
        assert [label_of[text] for text in part.texts] == part.labels
        for label, count in Counter(part.labels).items():
            assert abs(count - len(part) * whole[label] / len(articles)) <= 1


def test_split_depends_on_the_seed_alone(articles: Texts) -> None:
    first, again, other = (stratified_split(articles, 50, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_split_without_a_rest_is_refused() -> None:
    data = Texts(["a", "b"], [0, 1], ["x", "y"])
    with pytest.raises(ValueError, match=r"^2 texts cannot be split into \(1, 1\) and a rest$"):
        stratified_split(data, 1, 1)
