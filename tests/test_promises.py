"""The page of promises is what the tests say."""

import promises


def test_the_page_is_up_to_date() -> None:
    assert promises.PAGE.read_text() == promises.page(), "run `python tests/promises.py`"


def test_every_promise_names_a_test_once() -> None:
    for promise, tests in promises.promises().items():
        assert promise.endswith("."), promise
        assert len(set(tests)) == len(tests)
