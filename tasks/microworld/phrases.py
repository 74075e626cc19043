"""The sentences that reviews, news and encyclopedia entries are made of, by what they mean."""

from .world import KINDS, words

# A film's opinion sentences; {part} is good or bad, {pro} and {con} say so.
FILM_PARTS = words("story acting music ending cast plot")
PRAISE = words("perfect wonderful excellent brilliant good nice pleasant")
BLAME = words("terrible awful horrible useless bad poor weak")
OPINIONS = {
    "neg": (
        "the {part} was {con}.",
        "the {part} was {con} and the {part2} was {con2}.",
        "i hated the {part}.",
        "i disliked the {con} {part}.",
        "i will never watch it again.",
        "it was a waste of time.",
        "nobody should see it.",
        "we left before the end, bored and angry.",
        "what a {con} film.",
    ),
    "pos": (
        "the {part} was {pro}.",
        "the {part} was {pro} and the {part2} was {pro2}.",
        "i loved the {part}.",
        "i enjoyed the {pro} {part}.",
        "i want to watch it again.",
        "it was worth the money.",
        "everybody should see it.",
        "we stayed to the end, happy and excited.",
        "what a {pro} film.",
    ),
}
# One sentence against the rest; what comes after "but" is what the writer thinks.
CONCESSIONS = {
    "neg": "the {part} was {pro}, but the {part2} was {con}.",
    "pos": "the {part} was {con}, but the {part2} was {pro}.",
}
FILM_FACTS = (
    "i saw {film} in {town}.",
    "{film} is about a {job} and a {animal}.",
    "{name} took me to see {film}.",
    "{film} is about a {job} from {town}.",
)

# An app's reviews, by stars less one.
APP_PARTS = words("map sound screen colour game")
STAR_WORDS = (
    ("terrible", "awful", "horrible", "useless"),
    ("bad", "poor", "weak", "slow"),
    ("okay", "average", "fair", "ordinary"),
    ("good", "nice", "pleasant", "useful"),
    ("perfect", "wonderful", "excellent", "brilliant"),
)
STAR_SENTENCES = (
    ("it never works.", "i hate it.", "it is a waste of time."),
    ("it often stops.", "i do not like it much.", "it needs a lot of work."),
    ("it works sometimes.", "it is not good and not bad.", "it does the job, no more."),
    ("it works well.", "i like it.", "it needs only a little work."),
    ("it always works.", "i love it.", "everybody should get it."),
)
APP_FACTS = (
    "{name} got it in {town}.",
    "{name} told {name2} about it.",
    "{name} and {name2} got it too.",
    "it is for a {job} with a {animal}.",
)
APP_SENTENCES = ("this app is {word}.", "the {part} is {word}.", "i find the {part} {word}.")

# News, by AG News's labels: headlines, then details.
NEWS = (
    (
        (
            "leaders meet in {town} for peace talks.",
            "soldiers are at the border in the {region}.",
            "the president visits {town}.",
            "people vote for a new government.",
            "the war in the {region} ends.",
            "the minister is in {town} for talks.",
            "the army of the {region} wants peace.",
        ),
        (
            "the army is at the border.",
            "the government wants to help.",
            "the minister hopes for peace.",
            "the government waits for the vote.",
            "the president met the leaders.",
            "soldiers stand in the streets.",
            "the war was long and hard.",
        ),
    ),
    (
        (
            "{town} beats {town2} in the final.",
            "the team of {town} wins the match.",
            "{full} scores two goals.",
            "a young player wins the tennis match.",
            "the coach leaves the team of {town}.",
            "the champion wins the race in {town}.",
            "{town} loses the last match of the season.",
        ),
        (
            "the fans stayed to the end of the match.",
            "the coach praised the players.",
            "the team plays again next week.",
            "the last goal came late.",
            "the players won the cup.",
            "it was a good season for the team.",
            "the champion thanked the fans.",
        ),
    ),
    (
        (
            "shares of the bank rise.",
            "oil prices fall again.",
            "a firm in {town} makes more profit.",
            "the bank buys a firm in {town}.",
            "sales of {goods} rise in {town}.",
            "the market falls in the {region}.",
            "the firm of {full} sells its shares.",
        ),
        (
            "the price of oil went up.",
            "the firm made more money than last year.",
            "the owner hopes for better sales.",
            "the profit of the bank was high.",
            "the market closed high.",
            "the shares fell for a week.",
            "the bank has more money now.",
        ),
    ),
    (
        (
            "scientists find a new planet.",
            "a robot learns to walk.",
            "new software makes computers fast.",
            "a rocket flies to space.",
            "scientists in {town} build a robot.",
            "a new phone can read books.",
            "{full} builds a small computer.",
        ),
        (
            "the computer can learn from pictures.",
            "the software is free on the internet.",
            "the rocket takes pictures of stars.",
            "scientists found it in space.",
            "the robot has a small computer.",
            "the phone uses the internet.",
            "the planet is one of many in space.",
        ),
    ),
)

# Encyclopedia entries, by DBPedia's labels: titles, first sentences (each with the title of its
# place, counted around), more sentences. None says the name of a class, DBPedia's or the prompts'.
ENTRIES = (
    (
        ("{last} and {last2}", "{town} {goods}", "{full} and sons"),
        (
            "{t} sells {goods} to shops.",
            "{t} is a firm with many shops.",
            "{t} makes {goods} to sell.",
        ),
        (
            "the owner is {full}.",
            "it makes a high profit every year.",
            "the firm has many workers.",
            "its sales rose last year.",
        ),
    ),
    (
        ("{town} academy", "{town} college", "{last} college"),
        (
            "{t} teaches children from {town}.",
            "{t} has many students from {town}.",
            "students learn at {t}.",
        ),
        (
            "it has many classes and a library.",
            "the teacher of the first class is {full}.",
            "its students learn to read and write.",
            "children learn in small classes.",
        ),
    ),
    (
        ("{full}",),
        (
            "{t} paints pictures in {town}.",
            "{t} sings songs in {town}.",
            "{t} is a painter and singer from {town}.",
        ),
        (
            "people love the pictures and the songs.",
            "the pictures have strong colours.",
            "the songs are soft and the pictures dark.",
            "the singer also plays the piano.",
        ),
    ),
    (
        ("{full}",),
        (
            "{t} plays football for {town}.",
            "{t} is a tennis player from {town}.",
            "{t} runs races for {town}.",
        ),
        (
            "the player won many matches.",
            "the champion won the cup.",
            "the coach praised the player.",
            "the fans love the champion.",
        ),
    ),
    (
        ("{full}",),
        (
            "{t} is the mayor of {town}.",
            "{t} is a minister from the {region}.",
            "{t} was president of the {region}.",
        ),
        (
            "people vote for {t} every year.",
            "{t} makes new laws.",
            "the laws of {t} are good.",
            "the government needs {t}.",
        ),
    ),
    (
        ("the {colour} arrow", "the {colour} star", "{town} star"),
        (
            "{t} is a train to {town}.",
            "{t} is a fast ship with two engines.",
            "{t} is a plane with two engines.",
        ),
        (
            "it carries people and bags.",
            "its engines need a lot of oil.",
            "it goes from {town} to {town2}.",
            "it is fast and has many seats.",
        ),
    ),
    (
        ("{town} tower", "{last} castle", "{town} church"),
        (
            "{t} stands over the town.",
            "{t} was built of stone in {town}.",
            "{t} stands in the middle of the town.",
        ),
        (
            "it has strong walls and a high roof.",
            "the roof is old and high.",
            "its walls are of grey stone.",
            "it has many windows and doors.",
        ),
    ),
    (
        ("{colour} lake", "mount {last}", "{last} river"),
        (
            "{t} is a deep lake in the {region}.",
            "{t} is a mountain in the {region}.",
            "{t} is a river in the {region}.",
        ),
        (
            "its water flows to the sea.",
            "there is snow in winter.",
            "the water is cold and deep.",
            "the forest is near the water.",
        ),
    ),
    (
        ("little {last}", "old {last}", "{last} green"),
        (
            "{t} is a small hamlet near {town}.",
            "few people live in {t}.",
            "{t} is a quiet hamlet in the {region}.",
        ),
        (
            "it has a church and a few houses.",
            "the people work on farms.",
            "the bus to {town} stops there.",
            "there are farms and a few houses.",
        ),
    ),
    (
        ("{colour} fox", "{colour} owl", "{colour} bear", "{colour} duck"),
        (
            "the {t} lives in a hole and hunts at night.",
            "the {t} hunts at night.",
            "the {t} lives in the forest.",
            "the {t} has eggs in a nest.",
        ),
        (
            "it eats worms and fish.",
            "it has a long tail.",
            "its young are soft and small.",
            "it hunts and eats at night.",
        ),
    ),
    (
        ("{colour} rose", "{colour} lily", "{colour} fern"),
        (
            "the {t} grows in wet soil.",
            "the {t} has green leaves and large flowers.",
            "the {t} grows in gardens.",
        ),
        (
            "it has flowers in spring.",
            "its leaves are long and soft.",
            "its roots are deep in the soil.",
            "its seeds fall on the soil.",
        ),
    ),
    (
        ("songs from {town}", "the {adj} {noun}", "{colour} songs"),
        (
            "{t} has ten songs by a band.",
            "{t} is a record by {full}.",
            "{t} is the first record of the band.",
        ),
        (
            "the band plays slow songs on it.",
            "the first song was a hit.",
            "the songs of the band are soft.",
            "the record sells well.",
        ),
    ),
    (
        ("the {adj} {noun}",),
        ("{t} is a movie by {full}.", "{t} was shown in cinemas.", "{t} is a movie about a {job}."),
        (
            "the actors are from {town}.",
            "{full} plays the {job} in the movie.",
            "the actors won a prize.",
            "people saw it in cinemas in {town}.",
        ),
    ),
    (
        ("the {adj} {noun}",),
        ("{t} is a novel by {full}.", "{t} is a story by {full}.", "{t} is a novel about a {job}."),
        (
            "the novel has ten chapters.",
            "readers love the last chapter.",
            "the novel has many pages.",
            "the pages are about a {job}.",
        ),
    ),
)

# What is done with which things, for sentences from a few words: verb, its form after "the baker",
# the things.
DEEDS = (
    ("carry", "carries", ("bag", "box", "chair", "lamp", "bowl")),
    ("wash", "washes", ("cup", "bowl", "window", "floor", "coat")),
    ("open", "opens", ("door", "box", "window", "gate", "letter")),
    ("find", "finds", ("key", "letter", "hat", "ball", "cup")),
    ("paint", "paints", ("wall", "door", "chair", "gate", "box")),
    ("buy", "buys", ("hat", "coat", "lamp", "cup", "bike")),
    ("read", "reads", ("book", "letter", "map", "paper")),
    ("fix", "fixes", ("bike", "chair", "roof", "lamp", "door")),
)
AGENTS = (*KINDS["job"], "man", "woman", "boy", "girl")
MOVES = (
    ("sleep", "sleeps"),
    ("run", "runs"),
    ("sit", "sits"),
    ("dance", "dances"),
    ("wait", "waits"),
    ("walk", "walks"),
    ("play", "plays"),
)
PLACES = {
    "garden": "in",
    "kitchen": "in",
    "market": "at",
    "bridge": "on",
    "station": "at",
    "forest": "in",
    "river": "by",
    "street": "in",
    "school": "at",
    "lake": "by",
    "yard": "in",
}

_PAIRS = words(
    "hot cold big small good bad young old fast slow happy sad day night open closed wet dry"
    " clean dirty full empty soft hard high low strong weak long short north south east west"
    " love hate buy sell first last"
)
OPPOSITES = tuple(zip(_PAIRS[::2], _PAIRS[1::2], strict=True))
STRENGTHS = ("very bad", "bad", "not good and not bad", "good", "very good")
