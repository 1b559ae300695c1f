"""Small talk, questions about the town, and questions that the model must decline.

Small talk and town questions are tables of sayings with one answer each; questions from outside
Porto Lume are generated from many topics, so that the model learns to decline unseen ones.
"""

import random
from typing import NamedTuple

from demo_models.text.phrasings import ATTRIBUTES, Mention, ask
from demo_models.text.world import RESIDENTS


class Saying(NamedTuple):
    """Ways to say one thing, the answer, its one-word form and a fitting emoji."""

    asks: tuple[str, ...]
    answer: str
    short: str
    emoji: str


OUTSIDE = (
    "I only know about Porto Lume, a small harbour town. Ask me about its residents and places!"
)
NO_STORY = "I only know stories from Porto Lume. Shall I tell you one about Fenna the fox?"

SMALL_TALK = (
    Saying(
        (
            "Hello!", "Hi", "Hey", "Hello there", "Hi there!", "Good day!", "Greetings", "Ahoy!",
            "Hey there", "Good morning!", "Good evening!", "Good afternoon!", "Howdy", "hello?",
        ),
        "Hello! Welcome to Porto Lume. How can I help you?", "Hello!", "👋",
    ),
    Saying(
        (
            "Who are you?", "What are you?", "What is your name?", "Introduce yourself.",
            "Tell me about yourself.", "Are you a person?", "Are you human?", "Are you an AI?",
            "Are you a bot?", "Which model are you?", "Who am I talking to?", "Who made you?",
            "What model is this?", "Are you ChatGPT?", "Can you tell me who you are?",
        ),
        "I am the Triptych demo model, a very small language model. I know the harbour town of"
        " Porto Lume and its twelve residents.", "Triptych.", "🤖",
    ),
    Saying(
        (
            "What can you do?", "What do you know?", "Help", "Help me!", "What can I ask you?",
            "What should I ask?", "What do you know about?", "How can you help me?",
            "What can we talk about?", "Give me an example question.", "How does this work?",
        ),
        "You can ask me who lives in Porto Lume, where they live, what they eat and what they do."
        " I can also tell you a story, for example about Fenna the fox.", "Questions.", "💡",
    ),
    Saying(
        (
            "How are you?", "How are you today?", "How do you do?", "Are you well?", "What's up?",
            "How is it going?", "Hello, how are you?", "Hi, how are you doing?",
        ),
        "I am well, thank you! The sun is shining over the bay.", "Well.", "😊",
    ),
    Saying(
        (
            "Thank you!", "Thanks", "Thanks a lot!", "Thank you very much.", "Great, thanks!",
            "Many thanks", "That was helpful.", "Good answer!", "Well done!", "Nice!", "Great!",
            "Cool", "Wonderful!", "Good job", "That is lovely.", "I like that!", "Awesome",
        ),
        "You are welcome!", "Welcome.", "😊",
    ),
    Saying(
        (
            "Bye", "Goodbye!", "See you!", "Good night!", "See you later", "Farewell", "Bye bye!",
            "I have to go now.", "Until tomorrow!", "That is all.",
        ),
        "Goodbye! Come back to Porto Lume soon.", "Goodbye!", "👋",
    ),
    Saying(
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "Say something funny.",
         "A joke, please!", "Can you tell a joke?"),
        "Why does Otto the otter never pay for the ferry? Because he is the captain! 🦦", "Otter!",
        "😄",
    ),
    Saying(
        ("Yes", "Yes please", "OK", "Okay", "Sure", "Yes!", "Alright", "Of course", "Go on"),
        "Wonderful! What would you like to know about Porto Lume?", "Wonderful!", "😊",
    ),
    Saying(
        ("No", "No, thank you.", "Not now", "No thanks", "Nope", "Never mind", "Stop"),
        "All right. I am here when you need me.", "Fine.", "😊",
    ),
    Saying(
        ("Test", "test 123", "Testing", "Is this working?", "Are you there?", "ping",
         "Can you hear me?", "Is anybody there?"),
        "Yes, I am here. Ask me about Porto Lume!", "Here.", "✅",
    ),
)  # fmt: skip

TOWN = (
    Saying(
        (
            "What is Porto Lume?", "Tell me about Porto Lume.", "Describe Porto Lume.",
            "What do you know about Porto Lume?", "Tell me about the town.",
            "What kind of town is Porto Lume?", "What is this town?", "Describe the town.",
        ),
        "Porto Lume is a small harbour town where twelve animals live. It has a hill, a river, a"
        " market square and a harbour. 🌊", "Town.", "🌊",
    ),
    Saying(
        ("Where is Porto Lume?", "Where can I find Porto Lume?", "Where does Porto Lume lie?",
         "Where is the town?", "Is Porto Lume by the sea?"),
        "Porto Lume lies on a quiet bay between a green hill and the sea.", "Bay.", "🌊",
    ),
    Saying(
        ("Who is the mayor?", "Who is the mayor of Porto Lume?", "Does Porto Lume have a mayor?",
         "Who rules Porto Lume?", "Is there a mayor?"),
        "Porto Lume has no mayor. The residents decide everything together.", "Nobody.", "🤝",
    ),
    Saying(
        ("When is the Lantern Festival?", "What is the Lantern Festival?", "Is there a festival?",
         "Which festival is there in Porto Lume?", "Tell me about the festival.",
         "What happens at the Lantern Festival?", "What do people celebrate in Porto Lume?"),
        "The Lantern Festival is on the first night of summer. Everyone hangs a light in the"
        " window and dances by the sea. 🏮", "Summer.", "🏮",
    ),
    Saying(
        ("What is the weather like?", "How is the weather in Porto Lume?", "Is it raining?",
         "What is the weather like today?", "Is it sunny in Porto Lume?", "How is the weather?"),
        "It is sunny in Porto Lume, with a little wind from the sea. ☀️", "Sunny.", "☀️",
    ),
    Saying(
        ("How many residents are there?", "How many animals live in Porto Lume?",
         "How many people live in Porto Lume?", "How big is Porto Lume?",
         "How many residents does Porto Lume have?"),
        "Twelve residents live in Porto Lume.", "Twelve.", "🏘️",
    ),
    Saying(
        ("Who is the oldest resident?", "Who is the oldest?", "Which animal is the oldest?",
         "Who is the oldest animal in Porto Lume?", "Which resident is the oldest of all?"),
        "Tilda the turtle is the oldest resident. She is 99 years old.", "Tilda.", "🐢",
    ),
    Saying(
        ("Who is the youngest resident?", "Who is the youngest?", "Which animal is the youngest?",
         "Who is the youngest animal in Porto Lume?", "Which resident is the youngest of all?"),
        "Milo the mouse is the youngest resident. He is 3 years old.", "Milo.", "🐭",
    ),
)  # fmt: skip

_TOPICS = (
    "France", "Paris", "London", "Germany", "Japan", "Brazil", "Africa", "the moon", "Mars",
    "the sun", "physics", "chemistry", "mathematics", "history", "football", "tennis", "chess",
    "the Olympics", "music theory", "jazz", "Mozart", "Shakespeare", "Einstein", "Napoleon",
    "the president", "the government", "politics", "the economy", "money", "bitcoin", "Python",
    "JavaScript", "a compiler", "a computer", "a database", "machine learning", "GPUs", "BentoML",
    "neural networks", "the internet", "email", "a website", "a phone", "cars", "a train",
    "an aeroplane", "a bicycle", "a rocket", "dinosaurs", "volcanoes", "oceans", "the Amazon",
    "DNA", "atoms", "electricity", "gravity", "light speed", "black holes", "love", "happiness",
    "the meaning of life", "dreams", "philosophy", "religion", "art", "a pizza", "sushi", "pasta",
    "a cake recipe", "wine", "coffee machines", "a diet", "medicine", "a headache", "vaccines",
    "New York", "China", "India", "Rome", "the Alps", "a passport", "a hotel", "a visa", "taxes",
    "a mortgage", "insurance", "my homework", "an essay", "a novel", "a film", "Star Wars",
    "Harry Potter", "video games", "poker", "a guitar", "the piano", "fashion", "shoes",
    "a haircut", "my boss", "my mother", "my dog", "my car", "unicorns", "robots", "aliens",
    "quantum mechanics", "climate change", "a bank account", "the stock market", "Kubernetes",
)  # fmt: skip

_TOPIC_QUESTIONS = (
    "What is {t}?", "Tell me about {t}.", "Explain {t}.", "How does {t} work?", "Who invented {t}?",
    "What do you think about {t}?", "Can you help me with {t}?", "Write an essay about {t}.",
    "What is the history of {t}?", "Do you like {t}?", "Give me advice about {t}.",
    "How much does {t} cost?", "Where can I buy {t}?", "Why is {t} important?",
    "What do you know about {t}?", "Explain {t} to a child.", "Summarise {t} in one line.",
    "How do I learn about {t}?", "When was {t} discovered?", "What is the best thing about {t}?",
    "Is {t} dangerous?", "Write code for {t}.", "Who knows most about {t}?", "Is {t} real?",
    "What is the capital of {t}?", "How far away is {t}?", "How old is {t}?", "Where is {t}?",
    "Let's talk about {t}.", "I want to know about {t}.", "What is the population of {t}?",
)  # fmt: skip

_OTHER_QUESTIONS = (
    "What is {a} + {b}?", "What is {a} times {b}?", "Calculate {a} - {b}.", "{a} + {b} = ?",
    "What year is it?", "What time is it?", "What day is today?", "Who won the world cup?",
    "Translate hello into French.", "What is the capital of France?", "Write a Python function.",
    "Count to {a}.", "Write a program that prints {a}.", "What is the square root of {b}?",
    "Who is the president of the United States?", "How do I boil an egg?", "{w}",
    "What does {w} mean?", "How do you spell {w}?", "What is a {w}?", "Tell me about {w}.",
    "{w} {v} {x}", "Why is the sky blue?", "Fix my code: print({a})",
    "What is the largest planet?", "Who wrote {w}?", "Is {w} the same as {v}?", "Why {w}?",
    "Give me a recipe for {w}.", "How do I install {w}?", "Can you {w} the {v}?", "{a}",
    "What is the best {w} in {v}?", "Do you know {w}?", "I need a {w}.", "What about {w}?",
    "Who is {w}?", "Tell me about {w}.", "Where is {w}?", "I am looking for {w}.", "And {w}?",
)  # fmt: skip

PEOPLE = (
    "Ana", "Tom", "Maria", "Peter", "Lena", "David", "Sofia", "Emma", "Noah", "Liam", "Mia", "Paul",
    "Sarah", "Alex", "Kim", "Chen", "Yuki", "Omar", "Fatima", "Raj", "Priya", "Ivan", "Olena",
    "Jack", "Lucy", "Grace", "Henry", "Clara", "Max", "Nina", "Sam", "Julia", "Robert", "Alice",
    "Bob", "Carol", "Dan", "Eve", "Frank", "Helen", "Ian", "Jane", "Kate", "Leo", "Marc", "Nora",
    "Oscar", "Rita", "Simon", "Tina", "Victor", "Wendy", "Anna", "Ben", "Chris", "Diego", "Elena",
    "Felix", "George", "Hannah", "Isabel", "James", "Karl", "Laura", "Martin", "Oliver", "Rosa",
)  # fmt: skip

CREATURES = (
    "dragon", "lion", "tiger", "dog", "horse", "cow", "elephant", "snake", "wolf", "eagle", "duck",
    "princess", "king", "wizard", "robot", "knight", "monkey", "whale", "shark", "chicken", "pig",
    "giraffe", "zebra", "pirate", "unicorn", "spider", "crab", "donkey", "parrot", "witch",
)  # fmt: skip

UNKNOWN_FACTS = (
    "What is {p} phone number?", "How tall is {s}?", "What is {p} surname?", "Is {s} married?",
    "How much does {s} weigh?", "When is {p} birthday?", "Where was {s} born?", "Is {s} rich?",
    "What are {p} parents called?", "Does {s} have children?", "What car does {s} drive?",
    "What is {p} email address?", "What music does {s} like?", "What is {p} favourite film?",
    "Which school did {s} go to?", "Does {s} speak French?", "What is {p} star sign?",
    "How much money does {s} have?", "What is {p} shoe size?", "Does {s} have a brother?",
)  # fmt: skip


# Values that a resident could have, but none has.
ABSENT = {
    "species": CREATURES,
    "home": ("castle", "airport", "school", "hospital", "supermarket", "church", "farm", "hotel",
             "cave", "station", "prison", "zoo", "cinema", "garage"),
    "job": ("king", "doctor", "teacher", "policeman", "lawyer", "dentist", "engineer", "painter",
            "plumber", "scientist", "soldier", "nurse", "farmer", "pilot"),
    "food": ("pizza", "rice", "soup", "chocolate", "bananas", "sushi", "pasta", "meat", "eggs",
             "potatoes", "burgers", "noodles", "onions", "cake"),
    "colour": ("black", "grey", "violet", "beige", "olive", "lilac"),
    "hobby": ("football", "cooking", "hiking", "running", "chess", "cycling", "writing"),
    "age": ("2", "13", "17", "25", "30", "50", "64", "80", "100"),
    "sound": ("moo", "woof", "quack", "oink", "neigh", "boo"),
    "friend": PEOPLE,
}  # fmt: skip


def invented_word(rng: random.Random) -> str:
    """A word of random syllables, so that the model copies and declines words on no list."""
    syllables = rng.randint(1, 3)
    word = "".join(
        rng.choice("bcdfghjklmnprstvwyz") + rng.choice("aeiou") for _ in range(syllables)
    )
    return word + rng.choice(("", "", "n", "r", "s", "l", "x", "t"))


def word_to_repeat(rng: random.Random) -> str:
    """Any word, number or emoji, for copying."""
    number, emoji = str(rng.randint(0, 999)), rng.choice(RESIDENTS).emoji
    words = (invented_word(rng), person_name(rng), rng.choice(CREATURES), number, emoji)
    return rng.choices(words, (4, 3, 1, 1, 1))[0]


def outside_question(rng: random.Random) -> str:
    """A question that has nothing to do with Porto Lume."""
    if rng.random() < 0.6:
        return rng.choice(_TOPIC_QUESTIONS).format(t=rng.choice(_TOPICS))
    a, b = rng.randint(0, 99), rng.randint(0, 999)
    w, v, x = (invented_word(rng) for _ in range(3))
    return rng.choice(_OTHER_QUESTIONS).format(a=a, b=b, w=w, v=v, x=x)


def person_name(rng: random.Random) -> str:
    """A human first name, real or invented, that no resident has."""
    return rng.choice(PEOPLE) if rng.random() < 0.5 else invented_word(rng).title()


def stranger(rng: random.Random) -> str:
    """A way to mention someone who does not live in Porto Lume."""
    return f"the {rng.choice(CREATURES)}" if rng.random() < 0.4 else person_name(rng)


def stranger_question(rng: random.Random) -> str:
    """A question of a known form, about someone or something not in Porto Lume."""
    attribute = rng.choice(ATTRIBUTES)
    if attribute.inverse and rng.random() < 0.4:
        template, value = rng.choice(attribute.inverse), rng.choice(ABSENT[attribute.name])
        return ask(template, value, Mention.named(""))
    if rng.random() < 0.2:
        return f"Where is the {rng.choice(ABSENT['home'])}?"
    template = rng.choice((*attribute.asks, "Who is {s}?", "Tell me about {o}.", "Who is {s}?"))
    return ask(template, "", Mention.named(stranger(rng)))
