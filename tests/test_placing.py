"""Things rest on one another: heights that can be worked out by hand, and places that will do."""

import numpy as np
import pytest
import torch
from solids import cube, joined, sphere, table

from coser.data.placing import BORNE, beside, box_of, drop, height_fields, on_floor, resting_places


def box(low, high):
    vertices, faces, _ = cube(1.0)
    low, high = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return vertices.double() * (high - low) / 2 + (high + low) / 2, faces


def together(*meshes):
    vertices, faces, _ = joined(*((v, f, torch.zeros(len(f), 3, 3)) for v, f in meshes))
    return vertices, faces


def ball(radius, center):
    vertices, faces, _ = sphere(radius, 64, center)
    return vertices.double(), faces


def pit(half, depth):
    """A block of side 2 and height 1 with a square hole of side 2 * half in the middle of its top."""
    walls = [box((-1, 0, -1), (-half, 1, 1)), box((half, 0, -1), (1, 1, 1)), box((-half, 0, -1), (half, 1, -half)),
             box((-half, 0, half), (half, 1, 1))]
    return together(box((-half, 0, -half), (half, 1 - depth, half)), *walls)


def chair():
    """A seat 0.5 high on four legs, and a back behind it."""
    legs = [box((x, 0, z), (x + .1, .45, z + .1)) for x in (-.4, .3) for z in (-.4, .3)]
    return together(box((-.4, .45, -.4), (.4, .5, .4)), box((-.4, .5, -.4), (.4, 1.1, -.3)), *legs)


def gap_between(lower, upper):
    """The smallest height of the upper mesh above the lower one, over columns that both have."""
    low, high = box_of(upper[0])
    window = (float(low[0]), float(low[2])), float((high - low)[[0, 2]].max()) / 200, 200
    return float((height_fields(*upper, *window)[0] - height_fields(*lower, *window)[1]).min())


def test_heights_are_those_of_the_nearest_and_the_farthest_face():
    slope = (torch.tensor([[0., 0, 0], [4, 4, 0], [0, 0, 4]], dtype=torch.float64), torch.tensor([[0, 1, 2]]))
    lowest, highest = height_fields(*together(slope, box((0, -2, 0), (1, -1, 1))), (0.0, 0.0), 1.0, 4)
    x = torch.arange(4) + 0.5
    assert torch.allclose(highest[0, :3], x[:3].double()), "row 0: z is 0.5; the slope rises with x"
    assert lowest[0, 0] == -2 and torch.allclose(lowest[0, 1:3], x[1:3].double())
    assert highest[3, 3] == -torch.inf and lowest[3, 3] == torch.inf, "beyond the triangle there is nothing"


def test_a_box_rests_exactly_on_a_box():
    rise, share = drop(box((-1, 0, -1), (1, 0.7, 1)), box((-.2, 3, -.3), (.4, 4, .3)))
    assert rise == pytest.approx(0.7 - 3, abs=1e-9) and share == 1


def test_a_box_over_a_step_rests_on_the_higher_half_alone():
    steps = together(box((-1, 0, -1), (0, 0.8, 1)), box((0, 0, -1), (1, 0.5, 1)))
    rise, share = drop(steps, box((-.5, 0, -.5), (.5, 1, .5)))
    assert rise == pytest.approx(0.8, abs=1e-9) and share == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("half", "expected"), [(0.3, (0.5**2 - 0.3**2) ** 0.5 + 1), (0.6, 0.4 + 0.5)])
def test_a_ball_lies_on_the_rim_of_a_narrow_pit_and_on_the_floor_of_a_wide_one(half, expected):
    rise, _ = drop(pit(half, 0.6), ball(0.5, (0, 0, 0)))
    assert rise == pytest.approx(expected, abs=0.006)


def test_something_wide_with_a_narrow_foot_rests_on_something_narrow():
    tree = together(box((-.04, 0, -.04), (.04, .4, .04)), box((-.5, .4, -.5), (.5, .8, .5)))
    moves = list(resting_places(box((-.1, 0, -.1), (.1, .3, .1)), tree, np.random.default_rng(0)))
    assert moves and all(float(m[1]) == pytest.approx(0.3, abs=1e-6) for m in moves)
    assert all(m[[0, 2]].abs().max() <= 0.1 for m in moves)


def test_nothing_rests_on_what_lies_elsewhere():
    assert drop(box((5, 0, 5), (6, 1, 6)), box((-1, 0, -1), (1, 1, 1))) == (-torch.inf, 0.0)


@pytest.mark.parametrize("upper", [box((-.1, 0, -.1), (.1, .3, .1)), ball(0.15, (0, 0.15, 0))])
def test_it_is_put_on_the_seat_of_a_chair_and_touches_it(upper):
    moves = list(resting_places(chair(), upper, np.random.default_rng(0)))
    assert moves
    for move in moves:
        assert float(move[1]) == pytest.approx(0.5, abs=2e-3)
        moved = upper[0] + move, upper[1]
        assert gap_between(chair(), moved) == pytest.approx(0, abs=2e-3)
        middle = box_of(moved[0]).mean(0)
        assert abs(float(middle[0])) < 0.4 and -0.3 < float(middle[2]) < 0.4


def test_what_lies_on_a_table_is_borne_by_its_top():
    vertices, faces, _ = table()
    lower = on_floor(vertices.double(), 1.0), faces
    upper, height = box((-.15, 0, -.1), (.15, .2, .1)), float(lower[0][:, 1].max())
    moves = list(resting_places(lower, upper, np.random.default_rng(1)))
    assert moves
    for move in moves:
        assert float(move[1]) == pytest.approx(height, abs=1e-6)
        again, share = drop(lower, (upper[0] + move, upper[1]))
        assert again == pytest.approx(0, abs=1e-6) and share >= BORNE


def test_no_place_is_found_where_it_would_fall_in_stand_on_an_edge_or_not_be_seen():
    draw = np.random.default_rng(0)
    wall = box((-1, 0, -.02), (1, 1, .02))
    assert not list(resting_places(wall, box((-.3, 0, -.3), (.3, .3, .3)), draw)), "an edge bears no base"
    bottomless = together(*(box(low, high) for low, high in (((-1, 0, -1), (-.95, 1, 1)), ((.95, 0, -1), (1, 1, 1)),
                                                           ((-1, 0, -1), (1, 1, -.95)), ((-1, 0, .95), (1, 1, 1)))))
    floor = box((-1, 0, -1), (1, .05, 1))
    assert not list(resting_places(together(bottomless, floor), box((-.3, 0, -.3), (.3, .3, .3)), draw)), "fallen in"
    assert not list(resting_places(pit(0.9, 0.6), box((-.3, 0, -.3), (.3, .3, .3)), draw)), "behind the pit's wall"


@pytest.mark.parametrize("side", [(0, -1), (0, 1), (2, -1), (2, 1)])
def test_neighbours_stand_the_gap_apart_and_on_the_asked_side(side):
    axis, sign = side
    a, b = box_of(box((-1, 0, -2), (1, 1, 2))[0]), box_of(box((4, 0, 5), (9, 1, 6))[0])
    moved = a + beside(a, b, side, gap=0.25, shift=0.5)
    between = moved[0, axis] - b[1, axis] if sign > 0 else b[0, axis] - moved[1, axis]
    assert float(between) == pytest.approx(0.25)
    assert float((moved.mean(0) - b.mean(0))[2 - axis]) == pytest.approx(0.5) and torch.equal(moved[:, 1], a[:, 1])


def test_on_the_floor_the_longest_side_is_what_was_asked():
    vertices = on_floor(box((3, 2, 1), (5, 3, 9))[0], 2.0)
    assert torch.allclose(box_of(vertices), torch.tensor([[-.25, 0, -1], [.25, .25, 1]], dtype=torch.float64))
