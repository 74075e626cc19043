"""What usually happens in the world: causes with their effects, and activities step by step."""

from typing import NamedTuple

from .world import Person


class Rule(NamedTuple):
    """A cause and its effect, two wordings of each; {p} is a person, {he} that person again.

    Two rules that share a topic may explain each other's ends, so neither serves as a wrong answer
    to the other.
    """

    topics: frozenset[str]
    causes: tuple[str, str]
    effects: tuple[str, str]


def _rules(table: str) -> tuple[Rule, ...]:
    lines = [line.strip() for line in table.strip().splitlines()]
    rules = []
    for cause, effect in zip(lines[::2], lines[1::2], strict=True):
        topics, cause = cause.split(": ")
        effect = effect.removeprefix("=> ")
        rules.append(
            Rule(frozenset(topics.split()), tuple(cause.split(" / ")), tuple(effect.split(" / ")))
        )
    return tuple(rules)


RULES = _rules("""
weather: it rained all day / it rained all night
=> the streets got wet / the river was full
weather: it snowed all night / it snowed all day
=> the hills were white / the road was white
sun weather: it was a hot day / the day was very hot
=> the wet clothes got dry / the wet grass got dry
broken: {p} dropped the glass / the glass fell on the floor
=> the glass broke / the glass was broken
fire: {p} left the bread in the oven / the oven was too hot
=> the bread was black / the bread got black
body: {p} ran a long way / {p} worked all day
=> {he} got tired / {he} was tired
body: {p} ate nothing all day / {p} had no food
=> {he} got hungry / {he} wanted to eat
body: {p} left the coat at home / {p} had no coat
=> {he} felt cold / {he} was cold
mishap: {p} lost the key / {p} had no key
=> {he} could not open the door / the door stayed closed
joy body: {p} won the race / {p} won first prize
=> {he} felt proud / {he} was proud
mishap: {p} lost an old friend / the pet of {p} ran away
=> {he} felt sad / {he} was sad
mishap: {p} saw a bear / {p} met a bear in the forest
=> {he} felt afraid / {he} was afraid
mishap body: {p} ate too much cake / {p} ate bad fish
=> {he} felt sick / {he} was sick
light sleep: {p} turned off the lamp / the lamp went off
=> the room got dark / the room was dark
sun weather: {p} gave the flowers water / {p} put seeds in the soil
=> the flowers grew / the garden was full of flowers
joy: {p} told a funny story / {p} had a funny hat
=> everybody laughed / the children laughed
sleep: {p} played a soft song / {p} was quiet for the baby
=> the baby went to sleep / the baby slept
animal: {p} gave the cat some fish / {p} gave the cat some food
=> the cat was full / the cat slept well
joy: {p} got a letter from a friend / {p} met an old friend
=> {he} felt happy / {he} was happy
mishap body: {p} had nothing to do / {p} waited all day
=> {he} got bored / {he} was bored
mishap: {p} cut a finger / the saw cut {p}
=> {he} needed help / {he} went to the doctor
clean: {p} washed the floor / {p} cleaned the house
=> the floor was clean / the house was clean
animal weather: {p} left the gate open / the gate was open all night
=> the sheep ran away / the sheep left the farm
sun fire: {p} made a fire / {p} put wood on the fire
=> the room got warm / the house was warm
""")


class Script(NamedTuple):
    """An activity: where it starts, and its four steps in order, without the person."""

    label: str
    start: str
    steps: tuple[str, str, str, str]


def _scripts(table: str) -> tuple[Script, ...]:
    scripts = []
    for block in table.strip().split("\n\n"):
        head, *steps = (line.strip() for line in block.splitlines())
        label, start = head.split(": ")
        scripts.append(Script(label, start, tuple(steps)))
    return tuple(scripts)


SCRIPTS = _scripts("""
baking bread: is in the bakery
puts water in a bowl
puts the bread in the oven
takes the warm bread out
cuts the bread for everybody

washing clothes: is in the yard
takes a box of clothes
washes the dirty clothes
puts the wet clothes on a rope
takes the dry clothes home

catching fish: is at the lake
sits in a small boat
throws the net in the water
pulls the full net out
sells the fish at the market

planting a tree: is in the garden
takes a spade
digs a hole in the soil
puts the young tree in the hole
gives the young tree some water

painting a wall: is in an empty room
buys some white paint
takes a brush and some paint
paints the old wall white
waits until the wall is dry

riding a horse: is on the farm
opens the gate for the horse
sits on the back of the horse
rides the horse to the hill
gives the horse some hay

making tea: is in the kitchen
fills a pan with water
waits until the water is hot
puts the hot tea in a cup
drinks the tea with honey

writing a letter: is at the table
takes a pen and paper
writes a letter to a friend
reads the letter again
takes the letter to the station

playing football: is on the field
meets the team
runs with the ball
scores two goals
thanks the team

making a fire: is in the forest
finds some dry wood
puts the wood on a stone
lights the wood
warms both hands at the fire

sewing a coat: is in the shop
buys some blue cloth
cuts the cloth
sews the cloth with a needle
wears the new coat

playing the piano: is on the stage
opens the piano
plays a slow song on the piano
stands up after the song
thanks the people

fixing a bike: is in the workshop
takes the wheel off the bike
fixes the wheel
puts the wheel on the bike
rides the bike home

going to bed: is tired at night
takes a book to bed
reads a few pages
closes the book
turns off the lamp
""")


def tell(text: str, person: Person, *, by_name: bool = False) -> str:
    """Writes a rule's end about `person`, who is {p}, and {he} the pronoun, or the name."""
    return text.format(p=person.name, he=person.name if by_name else person.he)
