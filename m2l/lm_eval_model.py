"""m2l's models, and merges in memory, for the tasks of EleutherAI's lm-evaluation-harness.

Importing this needs lm_eval, an extra of m2l, and registers the model `m2l` with it.
"""

import bisect
import collections
import functools
import inspect
import itertools
import json
import warnings
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from m2l import models, partitioning, storage
from m2l.data import layouts, vocabularies
from m2l.data.chat import ChatTemplate
from m2l.data.examples import GenerationExample, RankingExample
from m2l.data.tokenizer_files import TokenizerJson
from m2l.data.vocabularies import TokenizerVocabulary
from m2l.errors import ConfigError, DataError, MergeError, UnknownNameError
from m2l.evaluation import batching, generation, ranking
from m2l.evaluation.decoding import Decoding
from m2l.evaluation.model import Model, load
from m2l.files import split_name
from m2l.merging import Recipe, merge_params
from m2l.progress import Progress
from m2l.typing import Json, Params
from m2l.version import __version__

_BATCH_SIZE = 32
_MAX_LENGTH = 2048
_LONG = 128
"""Tokens: so long texts are decoded to a quarter first, and further where no stop ended them."""

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""The texts of a context and its continuation, and their tokens."""


@register_model("m2l")
class HarnessModel(TemplateLM):
    """A checkpoint, or a merge in memory, that answers lm-evaluation-harness by `m2l eval`'s means.

    Args:
        checkpoint: The model: m2l's own, a Hugging Face directory or name, or BASE+ADAPTER.
        base: In place of `checkpoint`: the base of a merge, which is not written.
        expert: The merge's experts, with `+` between them.
        recipe: The merge's recipe, a JSON file as `m2l merge --recipe` reads it.
        vocabulary: A name that `vocabularies.load` takes; by default the model's own. "chat@DATE:"
            before it tells a chat template the date.
        end: Whether the end token is scored behind each continuation, as `m2l eval` does.
        max_length: Tokens of a row: a longer one loses its beginning. By default the model's
            `max_position_embeddings`; of a T5 2,048 on each side.
        dtype: float32 or bfloat16, what is computed in.
        fsdp: Devices to split the model over.
        model: Devices to split layers over.
        batch_size: Contexts in a batch; "auto": 32.
        device, max_batch_size: Of lm-evaluation-harness; not used, as devices are JAX's.

    Raises:
        UnknownNameError: An argument is none of these.
        M2LError: The model, the recipe or the vocabulary is not usable.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        base: str | None = None,
        expert: str | Sequence[str] = (),
        recipe: str | None = None,
        vocabulary: str | None = None,
        end: bool = False,
        max_length: int | None = None,
        dtype: str = "float32",
        fsdp: int = 1,
        model: int = 1,
        batch_size: int | str = _BATCH_SIZE,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Json,
    ):
        super().__init__()
        for name in unknown:
            known = [*inspect.signature(HarnessModel).parameters][:-1]
            raise UnknownNameError("argument of the model m2l", name, known)
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype={dtype}: expected float32 or bfloat16")
        self._mesh = partitioning.make_mesh(fsdp=fsdp, model=model)
        experts = expert.split("+") if isinstance(expert, str) else list(expert)
        if checkpoint and not (base or experts or recipe):
            self._model = load(checkpoint, vocabulary)
            self._params, self._digest = self._placed(self._model), self._model.digest
        elif experts and recipe and not checkpoint:
            read = Recipe.read(storage.path(recipe))
            self._model, self._params, self._digest = self._merged(base, experts, read, vocabulary)
        else:
            raise ConfigError(
                "the model m2l: expected checkpoint=MODEL, or expert=MODEL+MODEL,recipe=FILE, with "
                "base=MODEL where the method needs one"
            )
        name = vocabulary or self._model.vocabulary["name"]
        self._name, self._vocabulary = name, vocabularies.load(name)
        if vocabularies.describe(self._vocabulary, name)["fingerprint"] != self.tokenizer_name:
            raise DataError(f"vocabulary {name!r} is not the one that the model reads")
        if self._vocabulary.chat_template:
            files, space = self._vocabulary.files, self._vocabulary.space
            self._vocabulary = TokenizerVocabulary(files, space=space)
        config = self._model.config
        self.backend = "causal" if config.decoder_only else "seq2seq"
        # Requests have the start token already, where a row begins with one.
        self._layout = layouts.PrefixLM(None) if config.decoder_only else layouts.of(config)
        self.max_length = max_length or getattr(config, "max_position_embeddings", _MAX_LENGTH)
        self.batch_size = _BATCH_SIZE if str(batch_size).startswith("auto") else int(batch_size)
        self._dtype, self._end = dtype, end

    def _placed(self, opened: Model) -> Params:
        return opened.read(partitioning.shardings(models.spec(opened.config), self._mesh))

    def _merged(
        self, base: str | None, experts: Sequence[str], recipe: Recipe, vocabulary: str | None
    ) -> tuple[Model, Params, str]:
        """Returns the first model, which has what is the same in all, and the merge's params."""
        opened = [load(path, vocabulary) for path in [*([base] if base else []), *experts]]
        first = opened[0]
        for other in opened[1:]:
            prints = [each.vocabulary["fingerprint"] for each in (first, other)]
            if other.config != first.config or prints[0] != prints[1]:
                raise MergeError(
                    f"{other.path}: another kind of model or vocabulary than {first.path}; merge "
                    "them by m2l merge, and score the result as a checkpoint"
                )
        params, digests = map(self._placed, opened), [each.digest for each in opened]
        base_params = next(params) if base else None
        merged = merge_params(base_params, [*params], recipe)
        base_digest = digests.pop(0) if base else None
        return first, merged, recipe.identity(base_digest, digests)

    # ---- Tokens

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._vocabulary.eos_id

    @property
    def _start_id(self) -> int | None:
        return vocabularies.start_id(self._vocabulary) if self.backend == "causal" else None

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context stands behind: the start token, else the end's."""
        return self.eot_token_id if self._start_id is None else self._start_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **options: object
    ) -> list[int]:
        """Encodes a text; a decoder's begins with the start token, which it may have itself."""
        ids = self._vocabulary.encode(string)
        if add_special_tokens is False or self._start_id in (None, *ids[:1]):
            return ids
        return [self._start_id, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encodes a context and what continues it, for a T5 apart and without the space between."""
        if self.backend == "causal":
            return super()._encode_pair(context, continuation)
        return self.tok_encode(context), self.tok_encode(continuation.lstrip(" "))

    # ---- Likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **options: object
    ) -> list[tuple[float, bool]]:
        """Scores continuations of contexts: their log-probability, and whether they are greedy."""
        ends = [self.eot_token_id] * self._end
        return self._scores([(context, [*ids, *ends]) for _, context, ids in requests])

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts, in windows of `max_length` tokens; each token counts once."""
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            pairs = utils.get_rolling_token_windows(
                self._vocabulary.encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = list(map(utils.make_disjoint_window, pairs))
            windows += own
            owners += [number] * len(own)
        totals = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._scores(windows), strict=True):
            totals[number] += score
        return totals

    def _scores(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Scores the second part of each row of tokens behind the first, which is read once."""
        by_context: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
        cut = 0
        for number, (context, ids) in enumerate(rows):
            # The last token is not read.
            room = self.max_length + 1 - len(ids) if self.backend == "causal" else self.max_length
            if min(room, self.max_length + 1 - len(ids)) < 1:
                raise DataError(
                    f"a continuation of {len(ids)} tokens does not fit in max_length="
                    f"{self.max_length}: raise it"
                )
            context = context or [self.prefix_token_id]
            cut += len(context) > room
            by_context[tuple(context[-room:])].append(number)
        self._warn_of_cut(cut, len(rows))
        examples = []
        for context, numbers in by_context.items():
            choices = tuple(np.array(rows[number][1], np.int32) for number in numbers)
            nothing = (False,) * len(choices), "", ("",) * len(choices), False
            examples.append(RankingExample(np.array(context, np.int32), choices, *nothing))
        done = 0
        with jax.set_mesh(self._mesh), Progress("score", len(examples), "contexts") as progress:

            def on_done(count: int) -> None:
                nonlocal done
                done += count
                progress.update(done)

            scores = ranking.likelihoods(
                self._model.config,
                self._params,
                examples,
                on_done=on_done,
                **self._options(len(examples)),
            )
        results = [(0.0, True)] * len(rows)
        for numbers, (scores_C, is_greedy_C) in zip(by_context.values(), scores, strict=True):
            for number, score, is_greedy in zip(numbers, scores_C, is_greedy_C, strict=True):
                results[number] = float(score), bool(is_greedy)
        return results

    def _options(self, count: int) -> dict[str, object]:
        devices = jax.device_count()
        return {
            "layout": self._layout,
            "batch_size": batching.fitting_size(self.batch_size, [count], devices),
            "dtype": self._dtype,
        }

    def _warn_of_cut(self, cut: int, count: int) -> None:
        if cut:
            warnings.warn(
                f"{cut} of {count} contexts are longer than max_length={self.max_length} leaves "
                "room for, and lost their beginning",
                stacklevel=3,
            )

    # ---- Texts

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Decodes texts up to a stop sequence, with the settings that each request has."""
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for number, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(number)
        texts = [""] * len(requests)
        for settings, numbers in groups.items():
            # What is asked for n times is drawn n times.
            by_context: dict[str, list[int]] = collections.defaultdict(list)
            for number in numbers:
                by_context[requests[number].args[0]].append(number)
            most = max(map(len, by_context.values()))
            decoding, stops, length = self._decoding(json.loads(settings), most)
            written = self._written([*by_context], decoding, stops, length)
            for places, samples in zip(by_context.values(), written, strict=True):
                for number, text in zip(places, itertools.cycle(samples), strict=False):
                    texts[number] = text
        return texts

    def _decoding(self, settings: dict[str, Json], repeats: int) -> tuple[Decoding, list[str], int]:
        """Returns how a request wants texts decoded, what stops them, and their tokens at most."""
        settings = dict(normalize_gen_kwargs(settings))
        stops, length = settings.pop("until"), settings.pop("max_gen_toks")
        draws, beams = settings.pop("do_sample"), settings.pop("num_beams", 1)
        temperature = settings.pop("temperature", 1.0)
        drawing = {
            name: settings.pop(name) for name in ("top_k", "top_p", "seed") if name in settings
        }
        for name in settings:
            known = ("do_sample", "max_gen_toks", "num_beams", "seed", "temperature", "top_k")
            raise UnknownNameError("generation setting", name, (*known, "top_p", "until"))
        if draws and temperature:
            drawing |= {"temperature": temperature, "samples": repeats}
            return Decoding(beams, **drawing), stops, length
        return Decoding(beams), stops, length

    def _written(
        self, contexts: Sequence[str], decoding: Decoding, stops: Sequence[str], length: int
    ) -> list[list[str]]:
        """Returns the texts that are decoded behind each context."""
        room = self.max_length - length if self.backend == "causal" else self.max_length
        if room < 1:
            raise DataError(
                f"{length} tokens to generate leave no room in max_length={self.max_length}: raise "
                "it, or ask for fewer by --gen_kwargs max_gen_toks=N"
            )
        tokens = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        self._warn_of_cut(sum(len(ids) > room for ids in tokens), len(tokens))
        nothing = np.empty(0, np.int32)
        examples = [
            GenerationExample(np.array(ids[-room:], np.int32), nothing, (), text, "", False)
            for ids, text in zip(tokens, contexts, strict=True)
        ]
        texts: list[list[str]] = [[] for _ in contexts]
        pending = list(range(len(contexts)))
        # Most texts are stopped early; what is decoded again begins as before, but of beams.
        again = decoding.beams == 1 and length >= _LONG
        lengths = [length // 4, length] if again else [length]
        with jax.set_mesh(self._mesh), Progress("generate", len(contexts), "texts") as progress:
            for so_far in lengths:
                written = generation.decode(
                    self._model.config,
                    self._params,
                    [examples[number] for number in pending],
                    decoding,
                    max_length=so_far,
                    eos_id=self.eot_token_id,
                    **self._options(len(pending)),
                )
                going: list[int] = []
                for number, samples in zip(pending, written, strict=True):
                    pairs = [self._ended(ids.tolist(), stops, so_far) for ids in samples]
                    texts[number] = [text for text, _ in pairs]
                    going += [number] * (not all(ended for _, ended in pairs))
                pending = going
                progress.update(len(contexts) - len(pending))
                if not pending:
                    break
            progress.update(len(contexts))
        return texts

    def _ended(self, ids: Sequence[int], stops: Sequence[str], length: int) -> tuple[str, bool]:
        """Returns a text up to where it is stopped, and whether it is, or would go on."""

        def is_stopped(count: int) -> bool:
            return any(stop in self._vocabulary.decode(ids[:count]) for stop in stops if stop)

        ended = len(ids) < length
        if is_stopped(len(ids)):
            ended, counts = True, range(len(ids) + 1)
            ids = ids[: bisect.bisect_left(counts, True, key=is_stopped)]
        # Tokens that are no text may stop one, and are left out of it, as transformers does.
        text = self._vocabulary.decode([id for id in ids if id not in self._special_ids])
        return postprocess_generated_text(text, [*stops], None), ended

    @functools.cached_property
    def _special_ids(self) -> set[int]:
        files = self._vocabulary.files
        if not isinstance(files, TokenizerJson):
            return set()
        added = files.tokenizer.get_added_tokens_decoder()
        return {number for number, token in added.items() if token.special}

    # ---- Chat

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        prefixes = split_name(self._name)[0]
        name = self._name if "chat" in prefixes else f"chat:{self._name}"
        return vocabularies.load(name).chat_template

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders messages by the model's chat template; without a prompt the last one goes on."""
        return self._template.render_messages(chat_history, goes_on=not add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template itself, for the results.

        Raises:
            ConfigError: One of several is asked for by name.
        """
        if isinstance(chat_template, str):
            raise ConfigError(f"--apply_chat_template {chat_template}: leave the name out")
        return self._template.source if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """The vocabulary's fingerprint, by which rendered requests are cached."""
        return self._model.vocabulary["fingerprint"]

    def get_model_info(self) -> dict[str, str]:
        """Returns what results say of the model."""
        return {"m2l_version": __version__, "model_digest": self._digest}
