import asyncio
import gc
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synth_fakes import make_request

from sft_probe.errors import UserError
from sft_probe.synth.asking.protocol import Answer, Request
from sft_probe.synth.asking.store import Store, request_key


class Name:
    """What a store must know of a writer."""

    def __init__(self, name: str = "w", model: str = "m", api_version: str = "v1") -> None:
        self.name, self.model, self.api_version = name, model, api_version


def answer(text: str | None = "text", **fields: object) -> Answer:
    values = {"status": "ok", "raw": '{"a": 1}', "text": text, "model_version": "m-1"}
    return Answer(**(values | {"num_prompt_tokens": 10, "num_output_tokens": 5} | fields))  # type: ignore[arg-type]


def save(
    store: Store,
    request: Request,
    item: Answer,
    cost_usd: float | None = 0.5,
    reservation: int | None = None,
) -> None:
    asyncio.run(
        store.save(Name(), request, item, cost_usd=cost_usd, attempts=1, reservation=reservation)
    )


def test_answers_survive_closing_and_opening_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "new/answers.sqlite")
    save(store, make_request("p"), answer())
    store.close()
    again = Store(tmp_path / "new/answers.sqlite")
    assert again.get(Name(), make_request("p")) == answer()
    assert again.get(Name(), make_request("q")) is None
    assert again.get(Name(model="m2"), make_request("p")) is None


@settings(max_examples=50)
@given(
    field=st.sampled_from(
        ["prompt", "template_sha256", "temperature", "max_output_tokens", "sample_index"]
    ),
    value=st.text() | st.integers(),
)
def test_the_key_changes_with_all_that_makes_an_answer(field: str, value: str | int) -> None:
    request = make_request("p")
    changes: dict[str, Any] = {field: value}
    other = replace(request, **changes)
    assert (request_key(Name(), other) == request_key(Name(), request)) == (
        value == getattr(request, field)
    )


def test_the_key_knows_the_writer_but_not_the_doc() -> None:
    request = make_request("p")
    keys = {
        request_key(name, request)
        for name in (Name(), Name("w2"), Name(model="m2"), Name(api_version="v2"))
    }
    assert len(keys) == 4
    assert request_key(Name(), replace(request, doc_id="other", category="variant")) == request_key(
        Name(), request
    )


def test_cost_sums_all_attempts_and_calls_without_an_answer(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.sqlite")
    lost = asyncio.run(store.reserve(0.25))
    held = asyncio.run(store.reserve(2.0))
    assert store.cost_usd() == 2.25
    save(store, make_request("p"), answer(None, status="error"), cost_usd=0.5, reservation=held)
    assert store.cost_usd() == 0.75
    assert store.lost_calls() == (1, 0.25)
    save(store, make_request("p"), answer(), cost_usd=0.125)
    assert store.cost_usd() == 0.875
    asyncio.run(store.release(lost))
    assert (store.cost_usd(), store.lost_calls()) == (0.625, (0, 0.0))


def test_counts_are_by_category_and_status(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.sqlite")
    for prompt, category in (("p", "variant"), ("q", "variant"), ("r", "paraphrase")):
        save(
            store,
            make_request(prompt, category=category),
            answer(),
            cost_usd=None if prompt == "r" else 0.5,
        )
    save(store, make_request("q"), answer(None, status="refused"), cost_usd=0.0)
    counts = [
        (c.category, c.status, c.num_answers, c.num_prompt_tokens, c.cost_usd)
        for c in store.counts()
    ]
    assert counts == [
        ("paraphrase", "ok", 1, 10, 0.0),
        ("variant", "ok", 1, 10, 0.5),
        ("variant", "refused", 1, 10, 0.5),
    ]


@settings(max_examples=20)
@given(st.text(st.characters(codec=None)))
def test_any_text_of_a_model_can_be_stored(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    store = Store(tmp_path_factory.mktemp("s") / "a.sqlite")
    save(store, make_request("p"), answer(text, reason=text, raw=text, model_version=text))
    found = store.get(Name(), make_request("p"))
    assert found is not None
    assert found.text == text.encode("utf-8", "replace").decode()
    store.close()


def test_many_answers_at_once_share_commits_and_are_all_there(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.sqlite")

    async def save_all() -> None:
        saves = (
            store.save(
                Name(),
                make_request(f"p{i}"),
                answer(f"t{i}"),
                cost_usd=1,
                attempts=1,
                reservation=None,
            )
            for i in range(500)
        )
        await asyncio.gather(*saves)

    asyncio.run(save_all())
    other = Store(tmp_path / "a.sqlite")
    assert [other.get(Name(), make_request(f"p{i}")) for i in range(500)] == [
        answer(f"t{i}") for i in range(500)
    ]


def test_answers_are_stored_though_their_tasks_are_cancelled(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.sqlite")

    async def cancelled() -> None:
        tasks = []
        for i in range(5):  # the first is on its way to the disk when the others come
            item = store.save(
                Name(), make_request(f"p{i}"), answer(), cost_usd=1, attempts=1, reservation=None
            )
            tasks.append(asyncio.create_task(item))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.drain()

    asyncio.run(cancelled())
    assert [store.get(Name(), make_request(f"p{i}")) for i in range(5)] == [answer()] * 5


def test_one_run_writes_at_a_time(tmp_path: Path) -> None:
    first, second = Store(tmp_path / "a.sqlite"), Store(tmp_path / "a.sqlite")
    with (
        first.exclusive(),
        pytest.raises(UserError, match="another run is writing to "),
        second.exclusive(),
    ):
        pass
    with second.exclusive():
        pass


@pytest.mark.parametrize(
    "content", [b"not a database, but long enough to be looked at" * 50, None, "version"]
)
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "a.sqlite"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        path.mkdir()
    else:
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match=r"(?i)a\.sqlite .*choose another"):
        Store(path)


def test_a_full_disk_is_reported_and_stored_answers_stay(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.sqlite")
    save(store, make_request("p"), answer())
    pages = store._connection.execute("PRAGMA page_count").fetchone()[0]
    store._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UserError, match=r"cannot write to .*full.* What was stored before is safe"):
        save(store, make_request("q"), answer("long" * 10_000))
    assert store.get(Name(), make_request("p")) == answer()


def test_a_store_that_is_never_closed_is_closed_with_its_last_reference(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.sqlite")
    save(store, make_request("p"), answer())
    connection = store._connection
    del store
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")
    with Store(tmp_path / "a.sqlite") as again:
        assert again.get(Name(), make_request("p")) == answer()
        again.close()  # twice is no fault
