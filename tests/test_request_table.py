"""The request table: who may write to a row, and when."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from virtual_time import run_on_virtual_time

from dilaserve import Config, Engine, Options
from dilaserve.sim.h200 import llada_8b_h200
from dilaserve.sim.run import pretended
from dilaserve.transport.request_table import RequestTable, nbytes, private_bytes
from dilaserve.types import Decoding

ROWS, LENGTH, MASK = 6, 40, 99


def empty():
    return RequestTable(ROWS, LENGTH, private_bytes(nbytes(ROWS, LENGTH)))


def filled(table, row, prompt=5, canvas=30):
    return table.fill(row, np.full(prompt, row, dtype=np.int32), canvas, MASK, Decoding())


@given(st.data())
def test_a_write_lands_in_rows_of_its_own_generation_only(data):
    table = empty()
    generations = np.array([filled(table, row) for row in range(ROWS)])
    for row in data.draw(st.lists(st.integers(0, ROWS - 1), max_size=8)):  # given away since the step began
        filled(table, row)
    rows = np.array(data.draw(st.lists(st.integers(0, ROWS - 1), unique=True, min_size=1)))
    width = data.draw(st.integers(1, 8))
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=width * len(rows), max_size=width * len(rows))))
    chosen = chosen.reshape(len(rows), width)
    positions = 5 + np.tile(np.arange(width), (len(rows), 1))
    before, sure = table.canvas.copy(), table.confidence.copy()
    token, confidence = np.full(chosen.shape, 7, dtype=np.int32), np.full(chosen.shape, 0.5, dtype=np.float32)
    written = table.unmask(rows, generations[rows], positions, chosen, token, confidence)
    for row, wanted, wrote in zip(rows, chosen, written, strict=True):
        wanted &= table.generation[row] == generations[row]
        assert wrote.tolist() == wanted.tolist()
        before[row, 5 : 5 + width][wanted] = 7
        sure[row, 5 : 5 + width][wanted] = 0.5
    assert np.array_equal(table.canvas, before)
    assert np.array_equal(table.confidence, sure)


def test_a_write_that_comes_while_the_row_is_filled_for_another_request_is_dropped():
    table = empty()
    old = filled(table, 2)

    class Late(SimpleNamespace):
        """Knobs of the next request, during whose reading a step of the last one ends."""

        @property
        def rule(self):
            there = np.array([[6]])
            token, sure = np.array([[7]], dtype=np.int32), np.array([[0.5]], dtype=np.float32)
            table.unmask(np.array([2]), np.array([old]), there, np.array([[True]]), token, sure)
            return "threshold"

    decoding = {name: getattr(Decoding(), name) for name in Decoding.__struct_fields__ if name != "rule"}
    table.fill(2, np.full(5, 3, dtype=np.int32), 30, MASK, Late(**decoding))
    assert table.canvas[2, :30].tolist() == [3] * 5 + [MASK] * 25
    assert not table.confidence[2].any()


def test_the_row_that_was_free_for_longest_is_used_next():
    async def rows():
        async with Engine(Config.of(max_queue=3), assemble=pretended(llada_8b_h200(), 1, 1024)) as engine:
            given = []
            for _ in range(7):
                stream = await engine.submit([0] * 32, Options(max_tokens=32))
                given.append(stream.request.row)
                async for _ in stream:
                    pass
                await engine.idle.wait()
            return given

    assert run_on_virtual_time(rows()) == [0, 1, 2, 0, 1, 2, 0]
