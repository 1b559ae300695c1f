"""The shape of one turn of a chat, and what a chat remembers from turn to turn."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from demo_models.text.phrasings import IT, Attribute, Mention
from demo_models.text.world import RESIDENTS, Resident


@dataclass(frozen=True)
class Turn:
    """A question, its one right answer and what later questions may build on.

    `short` is the one-word answer. `key` names the combination of phrasing and subject, for
    holding out. `focus` holds the residents that a pronoun may mean next, `attribute` is what
    "And Bruno?" would ask for, `hero` whom a story was about, `note` what the user told about
    themselves. An `aside`, such as thanks, leaves all of these as they were. The answer to a
    `literal` question copies from it, so it must not be retyped.
    """

    question: str
    answer: str
    short: str
    emoji: str = "🙂"
    key: str = ""
    focus: tuple[Resident, ...] = ()
    attribute: Attribute | None = None
    hero: Resident | None = None
    note: tuple[str, str] | None = None
    aside: bool = False
    literal: bool = False


@dataclass
class Memory:
    """What the chat so far has established: its last turn of substance and the user's notes."""

    last: Turn = field(default_factory=lambda: Turn("", "", ""))
    notes: dict[str, str] = field(default_factory=dict)

    def record(self, turn: Turn) -> None:
        """Takes a finished turn into account."""
        if turn.note:
            self.notes.update([turn.note])
        if not turn.aside:
            self.last = turn


# Makes a turn that fits the memory, or None where this kind of turn makes no sense now.
TurnMaker = Callable[[Memory, random.Random], Turn | None]


def pronounceable(*residents: Resident) -> tuple[Resident, ...]:
    """The residents, if she and he tell them apart; none of them otherwise."""
    return residents if len({who.female for who in residents}) == len(residents) else ()


def some_resident(memory: Memory, rng: random.Random) -> tuple[Resident, Mention]:
    """A resident to ask about, mentioned by a pronoun where the chat makes that clear."""
    if memory.last.focus and rng.random() < 0.6:
        who = rng.choice(memory.last.focus)
        as_it = len(memory.last.focus) == 1 and rng.random() < 0.3
        return who, IT if as_it else Mention.pronoun(who)
    who = rng.choice(RESIDENTS)
    return who, Mention.named(some_name(who, rng))


def some_name(who: Resident, rng: random.Random) -> str:
    """One of the names of a resident: Fenna, Fenna the fox or the fox."""
    return rng.choices((who.name, who.full_name, f"the {who.species}"), (60, 15, 25))[0]
