"""T5 and Llama in NumPy, float64, one example at a time and without padding.

Each gives log p(target | inputs), summed over the target's tokens, and what every kernel is
multiplied by, as {name: X [tokens, d_in]}.
"""

import numpy as np


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


class Network:
    def __init__(self, params):
        self.params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
        self.inputs = {}

    def times(self, x, name):
        self.inputs[name] = x
        return x @ self.params[name]

    def norm(self, x, name, epsilon):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + epsilon) * self.params[name]

    def log_likelihood(self, hidden, target):
        log_p = np.log(softmax(self.times(hidden, "decoder/logits")))
        return log_p[np.arange(len(target)) + len(hidden) - len(target), target].sum()


def heads(x, count):
    return x.reshape(len(x), count, -1).swapaxes(0, 1)


def attended(query, key, value, bias, scale=1.0):
    """[heads, tokens, size] each, to [tokens, heads * size]."""
    read = softmax(query @ key.swapaxes(1, 2) * scale + bias) @ value
    return read.swapaxes(0, 1).reshape(read.shape[1], -1)


def t5(config, params, inputs, target):
    """A T5 with gated-gelu whose relative positions all share a bias, untied, shorter than 17."""
    net, count, epsilon = Network(params), config.num_heads, config.layer_norm_epsilon

    def attention(x, memory, name, bias):
        parts = {"query": x, "key": memory, "value": memory}
        split = [heads(net.times(of, f"{name}/{part}"), count) for part, of in parts.items()]
        return net.times(attended(*split, bias), f"{name}/out")

    def mlp(x, name):
        h = net.times(x, f"{name}/wi_0")
        h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        return net.times(h * net.times(x, f"{name}/wi_1"), f"{name}/wo")

    def stack(side, tokens, layers, memory=None):
        x = net.params["token_embedder"][tokens]
        future = np.triu(np.full((len(x),) * 2, -np.inf), 1) if side == "decoder" else 0.0
        for name in (f"{side}/layers_{layer:02}" for layer in range(layers)):
            h = net.norm(x, f"{name}/pre_self_attention_norm", epsilon)
            x = x + attention(h, h, f"{name}/self_attention", future)
            if memory is not None:
                h = net.norm(x, f"{name}/pre_cross_attention_norm", epsilon)
                x = x + attention(h, memory, f"{name}/cross_attention", 0.0)
            x = x + mlp(net.norm(x, f"{name}/pre_mlp_norm", epsilon), f"{name}/mlp")
        return net.norm(x, f"{side}/norm", epsilon)

    encoded = stack("encoder", inputs, config.num_encoder_layers)
    read = np.append(config.decoder_start_token_id, target[:-1])
    decoded = stack("decoder", read, config.num_decoder_layers, encoded)
    return net.log_likelihood(decoded, target), net.inputs


def llama(config, params, inputs, target):
    """A Llama with plain rotary positions, untied."""
    net, epsilon = Network(params), config.rms_norm_eps
    row = np.concatenate([inputs, target])[:-1]
    pairs = np.arange(config.head_dim // 2)
    rates = config.rope_theta ** (-2 * pairs / config.head_dim)
    turns = np.exp(1j * np.arange(len(row))[:, None] * rates)

    def turned(x):
        first, second = np.split(x, 2, axis=-1)
        x = (first + 1j * second) * turns
        return np.concatenate([x.real, x.imag], axis=-1)

    x = net.params["token_embedder"][row]
    future = np.triu(np.full((len(row),) * 2, -np.inf), 1)
    shared = config.num_attention_heads // config.num_key_value_heads
    for name in (f"decoder/layers_{layer:02}" for layer in range(config.num_hidden_layers)):
        h = net.norm(x, f"{name}/pre_self_attention_norm", epsilon)
        attention = f"{name}/self_attention"
        query = turned(heads(net.times(h, f"{attention}/query"), config.num_attention_heads))
        key, value = (
            heads(net.times(h, f"{attention}/{part}"), config.num_key_value_heads)
            for part in ("key", "value")
        )
        key, value = (np.repeat(part, shared, axis=0) for part in (turned(key), value))
        read = attended(query, key, value, future, config.head_dim**-0.5)
        x = x + net.times(read, f"{attention}/out")
        h = net.norm(x, f"{name}/pre_mlp_norm", epsilon)
        gate = net.times(h, f"{name}/mlp/wi_0")
        gate = gate / (1 + np.exp(-gate))
        x = x + net.times(gate * net.times(h, f"{name}/mlp/wi_1"), f"{name}/mlp/wo")
    return net.log_likelihood(net.norm(x, "decoder/norm", epsilon), target), net.inputs
