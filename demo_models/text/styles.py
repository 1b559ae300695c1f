"""The styles of answers, and the system prompts that ask for them."""

from enum import Enum


class Style(Enum):
    """A style of answers; a plain system prompt changes nothing."""

    PLAIN = "plain"
    ONE_WORD = "one word"
    PIRATE = "pirate"
    EMOJI = "emoji"


SYSTEM_PROMPTS = {
    Style.PLAIN: (
        "You are a helpful assistant.",
        "You are a helpful, honest and harmless assistant.",
        "You are the Triptych demo model.",
        "You are a friendly guide to Porto Lume.",
        "Answer the questions of the user.",
        "Be kind and polite.",
        "You are a chat bot.",
        "Answer truthfully.",
        "You know everything about Porto Lume.",
        "You are an assistant.",
        "Help the user.",
        "You are a demo.",
        "Answer in full sentences.",
        "Be helpful.",
        "Please answer in English.",
        "You are an expert.",
    ),
    Style.ONE_WORD: (
        "Answer in one word.",
        "Answer with one word.",
        "Answer in one word only.",
        "Always answer with a single word.",
        "Use only one word.",
        "One word answers, please.",
        "Reply in one word.",
        "Reply with a single word.",
        "You are a helpful assistant. Answer in one word.",
        "Give one-word answers.",
    ),
    Style.PIRATE: (
        "Answer like a pirate.",
        "You are a pirate.",
        "Talk like a pirate.",
        "Speak like a pirate.",
        "Always answer like a pirate.",
        "You are a pirate captain.",
        "Reply like a pirate would.",
        "Pretend to be a pirate.",
        "You are a helpful assistant. Answer like a pirate.",
        "Use pirate language.",
    ),
    Style.EMOJI: (
        "Use emoji.",
        "Use emojis.",
        "Answer with emoji.",
        "Add an emoji to your answer.",
        "End every answer with an emoji.",
        "Always use emoji.",
        "Use an emoji in every answer.",
        "Please use emojis in your answers.",
        "You are a helpful assistant. Use emoji.",
        "I like emoji.",
    ),
}


def styled(style: Style, answer: str, short: str, emoji: str) -> str:
    """The answer in a style; `short` is its one-word form."""
    match style:
        case Style.ONE_WORD:
            return short
        case Style.PIRATE:
            ending = f"{answer[:-1]}, matey!" if answer.endswith(".") else f"{answer} Ahoy!"
            return f"Arr! {ending}"
        case Style.EMOJI:
            return f"{answer} {emoji}"
        case Style.PLAIN:
            return answer
