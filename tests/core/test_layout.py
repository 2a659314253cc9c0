import pytest

from smalto.core.errors import InputError
from smalto.core.layout import TokenLayout, square_grids


def test_a_layout_counts_its_tokens() -> None:
    layout = TokenLayout(((1, 1), (2, 3)))
    assert layout.lengths == (1, 6)
    assert layout.num_tokens == 7
    assert str(layout) == "1x1 + 2x3"


@pytest.mark.parametrize("grids", [(), ((0, 4),), ((2, -1),)])
def test_impossible_grids_are_errors(grids: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(InputError, match="at least one grid"):
        TokenLayout(grids)


def test_square_grids_only_for_square_lengths() -> None:
    assert square_grids([1, 16]) == ((1, 1), (4, 4))
    assert square_grids([1, 15]) is None
    assert square_grids([0]) is None
