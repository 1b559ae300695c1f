"""The seeded generator of the training text: chats about Porto Lume, and plain text.

Every question has one right answer, which depends only on the chat so far; what users ask, and how,
is random. A share of all combinations of phrasing and subject is held out: they are never generated
for training, and measure how well the model generalises.
"""

import random
import zlib
from typing import TypeVar

from demo_models.text import other_turns, resident_turns, tales, talk
from demo_models.text.styles import SYSTEM_PROMPTS, Style, styled
from demo_models.text.turns import Memory, Turn, TurnMaker
from demo_models.text.world import PLACES, RESIDENTS

Messages = list[dict[str, str]]
T = TypeVar("T")

TURN_WEIGHTS: dict[TurnMaker, int] = {
    resident_turns.open_question: 26,
    resident_turns.yes_no_question: 17,
    resident_turns.inverse_question: 18,
    resident_turns.follow_up: 8,
    resident_turns.description: 5,
    resident_turns.comparison: 20,
    other_turns.story: 3,
    other_turns.poem: 1,
    other_turns.place: 6,
    other_turns.route: 4,
    other_turns.listing: 2,
    other_turns.small_talk: 5,
    other_turns.town: 3,
    other_turns.outside: 11,
    other_turns.echo: 5,
    other_turns.user_name: 9,
    other_turns.user_taste: 6,
}
_STYLE_WEIGHTS = {Style.PLAIN: 70, Style.ONE_WORD: 10, Style.PIRATE: 10, Style.EMOJI: 10}
_TURN_COUNTS = {1: 30, 2: 25, 3: 15, 4: 10, 6: 10, 12: 6, 24: 3}
_HELD_OUT_ONE_IN = 12
_OPENERS = ("Please tell me: ", "Hey, ", "Quick question: ", "Hello! ", "So, ", "Tell me, ")
_UNACCENTED = str.maketrans("éêöã", "eeoa")
_SPELLINGS = (
    ("favourite", "favorite"),
    ("colour", "color"),
    ("What is", "What's"),
    ("Who is", "Who's"),
    ("Where is", "Where's"),
)


def is_held_out(turn: Turn) -> bool:
    """Whether the turn's combination of phrasing and subject is excluded from training."""
    return bool(turn.key) and zlib.crc32(turn.key.encode()) % _HELD_OUT_ONE_IN == 0


def chat(rng: random.Random, style: Style | None = None, turns: int | None = None) -> Messages:
    """A chat for training; it ends with the assistant."""
    style = style or _weighted(_STYLE_WEIGHTS, rng)
    memory, messages = Memory(), _system(style, rng)
    for _ in range(turns or _weighted(_TURN_COUNTS, rng)):
        turn = _next_turn(memory, rng)
        memory.record(turn)
        question = turn.question if turn.literal else as_typed(turn.question, rng)
        answer = styled(style, turn.answer, turn.short, turn.emoji)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def held_out_chats(rng: random.Random, count: int) -> list[Messages]:
    """Distinct chats of one turn each, whose combinations no training chat contains."""
    chats: dict[str, Messages] = {}
    while len(chats) < count:
        maker = _weighted(TURN_WEIGHTS, rng)
        turn = maker(Memory(), rng)
        if turn and is_held_out(turn):
            question = {"role": "user", "content": turn.question}
            chats[turn.key] = [question, {"role": "assistant", "content": turn.answer}]
    return list(chats.values())


def plain_text(rng: random.Random) -> str:
    """A text without chat markers, as a raw completion should continue it."""
    # Stories about Fenna and about best friends are the most frequent, so that the opening alone
    # has one likely continuation.
    hero = RESIDENTS[0] if rng.random() < 0.5 else rng.choice(RESIDENTS)
    match rng.choice(("story", "story", "story", "portrait", "place", "town")):
        case "portrait":
            return tales.portrait(hero)
        case "place":
            return tales.place_portrait(rng.choice(PLACES))
        case "town":
            return talk.TOWN[0].answer
        case _:
            other = rng.choice(RESIDENTS)
            stray = rng.random() < 0.1 and other is not hero
            return tales.long_story(hero, other if stray else hero.friend)


def as_typed(question: str, rng: random.Random) -> str:
    """The question as typed by a user: in British or American spelling, tidily or not."""
    for british, other in _SPELLINGS:
        if rng.random() < 0.3:
            question = question.replace(british, other)
    if rng.random() < 0.3:
        question = question.translate(_UNACCENTED)
    if rng.random() < 0.08:
        question = rng.choice(_OPENERS) + question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    return question


def _next_turn(memory: Memory, rng: random.Random) -> Turn:
    while True:
        turn = _weighted(TURN_WEIGHTS, rng)(memory, rng)
        if turn and not is_held_out(turn):
            return turn


def _system(style: Style, rng: random.Random) -> Messages:
    if style is Style.PLAIN and rng.random() < 0.6:
        return []
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS[style])}]


def _weighted(weights: dict[T, int], rng: random.Random) -> T:
    return rng.choices(list(weights), list(weights.values()))[0]
