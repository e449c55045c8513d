"""Rankings from JSONL: every form, ties, and errors that name file and line."""

from __future__ import annotations

import itertools
import json

import pytest

from fastgpt.data.examples import embedded
from fastgpt.data.rankings import Ranking, read_rankings, untied
from fastgpt.errors import DataError


@pytest.fixture
def read(tmp_path):
    """Reads one record behind a good one, so that it stands in line 2."""
    path = tmp_path / "rankings.jsonl"

    def one(record: dict) -> Ranking:
        good = {"prompt": "p", "responses": ["a", "b"]}
        path.write_text("\n".join(json.dumps(values) for values in (good, record)))
        ranking = read_rankings([path])[1]
        assert (ranking.source, ranking.line) == (path, 2)
        return ranking

    return one


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def test_an_order_is_a_ranking_of_all_pairs(read):
    ranking = read({"prompt": "Why?", "responses": ["good", "fair", "bad"], "src": "ignored"})
    assert ranking.prompt == [user("Why?")]
    assert ranking.responses == ["good", "fair", "bad"]
    assert ranking.pairs() == [(0, 1), (0, 2), (1, 2)]
    assert ranking.scores == [2.0, 1.0, 0.0]
    assert not ranking.scored


@pytest.mark.parametrize(
    ("key", "values"), [("scores", [0.5, -1.0, 2.5, 0.5]), ("ranks", [2, 3, 1, 2])]
)
def test_scores_rise_and_ranks_fall_towards_the_best(key, values, read):
    ranking = read({"prompt": "p", "responses": ["b", "d", "a", "c"], key: values})
    assert ranking.responses == ["a", "b", "c", "d"]
    better = {"a": "bcd", "b": "d", "c": "d", "d": ""}
    found = {(ranking.responses[i], ranking.responses[j]) for i, j in ranking.pairs()}
    assert found == {(x, y) for x in better for y in better[x]}
    assert ranking.scored == (key == "scores")


def test_pairs_of_a_double_loop_over_scores_with_ties(read):
    scores = [1.0, 3.0, 1.0, 2.0, 3.0]
    responses = [f"text {i}" for i in range(5)]
    ranking = read({"prompt": "p", "responses": responses, "scores": scores})
    expected = {
        (responses[i], responses[j])
        for i, j in itertools.product(range(5), repeat=2)
        if scores[i] > scores[j]
    }
    pairs = [(ranking.responses[i], ranking.responses[j]) for i, j in ranking.pairs()]
    assert set(pairs) == expected
    assert len(pairs) == len(expected) == 8


def test_the_same_text_twice_is_a_tie(read):
    ranking = read({"prompt": "p", "responses": ["x", "x", "y"]})
    assert ranking.pairs() == [(0, 2), (1, 2)]


def test_a_pair(read):
    ranking = read({"prompt": "p", "chosen": "good", "rejected": ""})
    assert (ranking.responses, ranking.pairs()) == (["good", ""], [(0, 1)])


def test_a_pair_with_a_margin_has_scores_that_differ_by_it(read):
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    ranking = read(pair | {"margin": 2.5})
    assert (ranking.responses, ranking.scores, ranking.scored) == (["good", "bad"], [2.5, 0], True)
    assert read(pair | {"margin": 0}).pairs() == []
    assert not read(pair | {"margin": None}).scored


@pytest.mark.parametrize("key", ["prompt", "messages"])
def test_a_prompt_of_several_turns(key, read):
    talk = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    assert read({key: talk, "responses": ["x", "y"]}).prompt == talk
    assert read({key: talk, "chosen": "x", "rejected": "y"}).prompt == talk


def test_pairs_of_conversations(read):
    talk = [user("a"), assistant("b"), user("c")]
    record = {"chosen": [*talk, assistant("x")], "rejected": [*talk, assistant("y")]}
    assert (read(record).prompt, read(record).responses) == (talk, ["x", "y"])
    answers = {"prompt": talk, "chosen": [assistant("x")], "rejected": [assistant("y")]}
    assert (read(answers).prompt, read(answers).responses) == (talk, ["x", "y"])


def test_transcripts_with_a_common_beginning(read):
    common = "\n\nHuman: Hi, how\n\nare you?\n\nAssistant: Fine.\n\nHuman: Why?"
    ranking = read(
        {
            "chosen": common + "\n\nAssistant: Spring: it is here.",
            "rejected": common + "\n\nAssistant: No idea.",
        }
    )
    assert ranking.prompt == [user("Hi, how\n\nare you?"), assistant("Fine."), user("Why?")]
    assert ranking.responses == ["Spring: it is here.", "No idea."]


def test_a_ranking_of_ties_alone_is_read_but_not_learned_from(read):
    tied = read({"prompt": "p", "responses": ["a", "b"], "scores": [1, 1]})
    good = read({"prompt": "p", "responses": ["a", "b"]})
    assert tied.pairs() == []
    assert untied([tied, good]) == [good]
    with pytest.raises(DataError, match="no ranking has a response better than another"):
        untied([tied])


HUMAN = "\n\nHuman: a\n\nAssistant: "


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "p"}, "neither 'responses' nor 'chosen' and 'rejected'"),
        ({"responses": ["a", "b"]}, "no key 'prompt'"),
        ({"prompt": "p", "responses": ["a"]}, "nothing to rank"),
        ({"prompt": "p", "responses": []}, "nothing to rank"),
        ({"prompt": "p", "responses": "ab"}, "'responses' is str, not a list"),
        ({"prompt": "p", "responses": ["a", 3]}, r"responses\[1\] is int"),
        ({"prompt": "p", "responses": ["a", "\ud800"]}, "surrogate"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1]}, "list of 2"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": 3}, "list of 2"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, True]}, r"scores\[1\] is True"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, "2"]}, r"scores\[1\] is '2'"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, float("nan")]}, "not a finite"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 10**400]}, r"ranks\[1\] is 1000"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": -1}, "'margin' is -1; it says"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "x"}, "'margin' is 'x'"),
        ({"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "scores": [2, 1]}, "both"),
        ({"prompt": [assistant("b")], "responses": ["a", "b"]}, "ends with the user"),
        ({"prompt": "p", "chosen": "a", "rejected": ["b"]}, "are str and list"),
        ({"chosen": "a", "rejected": "b"}, "is no transcript"),
        ({"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"}, "nothing of the user"),
        ({"chosen": HUMAN + "x", "rejected": HUMAN.replace(": a", ": b") + "y"}, "differ before"),
        ({"chosen": HUMAN + "x\n\nHuman: b", "rejected": HUMAN + "y"}, "end with the assistant"),
        ({"chosen": [assistant("x")], "rejected": [assistant("y")]}, "nothing of the user"),
        ({"chosen": [user("a")], "rejected": [user("a")]}, "does not end with the assistant"),
    ],
)
def test_an_error_names_file_line_and_problem(record, problem, read):
    with pytest.raises(DataError, match=rf"rankings\.jsonl:2: .*{problem}") as error:
        read(record)
    assert "\n" not in str(error.value)


def test_the_embedded_rankings():
    rankings = read_rankings([embedded("rankings")])
    assert len(rankings) == 1698
    assert sum(len(ranking.pairs()) for ranking in rankings) == 5079
    assert all(ranking.scored for ranking in rankings)
