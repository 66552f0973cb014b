from __future__ import annotations

import numpy as np
import pytest

from hsnn_core.row_table import GrowingRows, RowTable


def test_rows_of_the_base_and_later_ones_by_number():
    base = np.arange(6).reshape(3, 2)
    table = RowTable(base, np.array([[10, 11], [12, 13]]))
    assert len(table) == 5
    assert table.shape == (5, 2)
    assert table.take(np.array([[4, 0], [2, 3]])).tolist() == [[[12, 13], [0, 1]], [[4, 5], [10, 11]]]
    assert table.take(np.array([1])).tolist() == [[2, 3]]
    assert table.part(slice(2, 4)).tolist() == [[4, 5], [10, 11]]
    assert table.part(slice(0, 2)).base is not None  # a view where nothing came later
    with pytest.raises(IndexError):
        table.take(np.array([5]))


def test_an_order_says_which_row_stands_where():
    table = RowTable(np.array([[0], [1]]), np.array([[7]]), order=np.array([2, 0, 2, 1]))
    assert len(table) == 4
    assert table.take(np.array([0, 1, 2, 3])).tolist() == [[7], [0], [7], [1]]
    assert table.part(slice(1, 3)).tolist() == [[0], [7]]


def test_appending_leaves_earlier_tables_as_they_were():
    rows = GrowingRows(np.array([[1, 1]]))
    tables = []
    for number in range(200):
        tables.append(rows.table())
        rows.append(np.full((number % 3, 2), number))
    counts = [1 + sum(n % 3 for n in range(number)) for number in range(200)]
    assert [len(table) for table in tables] == counts
    whole = rows.table().take(np.arange(len(rows)))
    for table, count in zip(tables, counts):
        np.testing.assert_array_equal(table.take(np.arange(count)), whole[:count])


def test_a_base_without_rows():
    rows = GrowingRows(np.empty((0, 2), dtype=np.float32))
    rows.append(np.array([[1.5, 2.5]], dtype=np.float32))
    assert rows.table().take(np.array([0, 0])).tolist() == [[1.5, 2.5], [1.5, 2.5]]
