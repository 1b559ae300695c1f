"""One turn of a chat, and the state of a chat from turn to turn."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from demo_models.text.phrasings import IT, Attribute, Mention
from demo_models.text.world import RESIDENTS, Resident


@dataclass(frozen=True)
class Turn:
    """A question, its one right answer and the context for later questions.

    `short` is the one-word answer. `key` identifies the combination of phrasing and subject, which
    decides whether it is held out. `focus` are the residents that a pronoun may mean next,
    `attribute` is what "And Bruno?" would ask for, `hero` the subject of a story, `note` a fact
    about the user. An `aside`, such as thanks, changes none of these. The answer to a `literal`
    question copies from it, so its spelling must not be varied.
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
    """The state of a chat: its last turn that was not an aside, and the facts about the user."""

    last: Turn = field(default_factory=lambda: Turn("", "", ""))
    notes: dict[str, str] = field(default_factory=dict)

    def record(self, turn: Turn) -> None:
        """Update the state with a finished turn."""
        if turn.note:
            self.notes.update([turn.note])
        if not turn.aside:
            self.last = turn


# Makes a turn that fits the chat so far, or None if such a turn makes no sense now.
TurnMaker = Callable[[Memory, random.Random], Turn | None]


def pronounceable(*residents: Resident) -> tuple[Resident, ...]:
    """The residents if pronouns distinguish them, else none."""
    return residents if len({who.female for who in residents}) == len(residents) else ()


def some_resident(memory: Memory, rng: random.Random) -> tuple[Resident, Mention]:
    """A resident to ask about, mentioned by a pronoun where that is unambiguous."""
    if memory.last.focus and rng.random() < 0.6:
        who = rng.choice(memory.last.focus)
        as_it = len(memory.last.focus) == 1 and rng.random() < 0.3
        return who, IT if as_it else Mention.pronoun(who)
    who = rng.choice(RESIDENTS)
    return who, Mention.named(some_name(who, rng))


def some_name(who: Resident, rng: random.Random) -> str:
    """One of the names of a resident: Fenna, Fenna the fox or the fox."""
    return rng.choices((who.name, who.full_name, f"the {who.species}"), (60, 15, 25))[0]
