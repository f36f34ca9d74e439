"""The emulated medium: which images a power cut can leave."""

from __future__ import annotations

from xipfs.memory.emulated import STATES_MAX, EmulatedMedium

A, B, C = b"AAAAAAAA", b"BBBBBBBB", b"CCCCCCCC"
O8 = bytes(8)


def heads(medium: EmulatedMedium) -> set[tuple[bytes, bytes, bytes]]:
    """Words 0 and 1 of the first line and word 0 of the second, of every state."""
    states = medium.states()
    assert states.exhaustive
    assert len(set(states.images)) == len(states.images)
    return {(image[:8], image[8:16], image[64:72]) for image in states.images}


def test_a_line_holds_a_prefix_of_its_stores_and_lines_are_independent() -> None:
    medium = EmulatedMedium(bytes(4096))
    medium.store(0, A)
    medium.store(64, C)
    medium.store(8, B)
    assert heads(medium) == {
        (O8, O8, O8),
        (A, O8, O8),
        (A, B, O8),
        (O8, O8, C),
        (A, O8, C),
        (A, B, C),
    }


def test_the_states_after_every_single_store_are_among_them() -> None:
    medium = EmulatedMedium(bytes(4096))
    seen = [bytes(medium.now)]
    for offset, word in ((0, A), (64, C), (8, B), (0, C), (72, A)):
        medium.store(offset, word)
        seen.append(bytes(medium.now))
    assert set(seen) <= set(medium.states().images)
    assert len(medium.states().images) == 4 * 3


def test_only_flush_and_fence_make_a_store_certain() -> None:
    medium = EmulatedMedium(bytes(4096))
    medium.store(0, A)
    medium.fence()
    assert heads(medium) == {(O8, O8, O8), (A, O8, O8)}
    medium.flush(0, 8)
    medium.store(8, B)
    assert heads(medium) == {(O8, O8, O8), (A, O8, O8), (A, B, O8)}
    medium.fence()
    assert heads(medium) == {(A, O8, O8), (A, B, O8)}
    medium.flush(0, 64)
    medium.fence()
    assert heads(medium) == {(A, B, O8)}


def test_a_large_store_tears_at_aligned_words_only() -> None:
    medium = EmulatedMedium(bytes(4096))
    medium.store(4, b"aaaa" + B + b"cc")
    assert sorted(image[:24] for image in medium.states().images) == [
        bytes(24),
        bytes(4) + b"aaaa" + bytes(16),
        bytes(4) + b"aaaa" + B + bytes(8),
        bytes(4) + b"aaaa" + B + b"cc" + bytes(6),
    ]


def test_too_many_states_are_taken_from_both_ends_and_sampled() -> None:
    medium = EmulatedMedium(bytes(4096))
    medium.store(0, b"x" * 4096)
    states = medium.states(seed=1)
    assert not states.exhaustive
    assert 2 * (1 + 64 + 64 + 64 * 63 // 2) < len(states.images) <= STATES_MAX + 512
    assert bytes(4096) in states.images
    assert b"x" * 4096 in states.images
    assert b"x" * 4088 + bytes(8) in states.images
    assert medium.states(seed=1) == states
