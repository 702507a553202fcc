"""What the tests of AdamW share: parameters, a stream of gradients, and a run over them."""

import math

import numpy as np

SHAPES = [(40, 16), (7,), (64, 3), (1,)]
DECAYS = [True, False, True, False]


def parameters(dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(dtype) for shape in SHAPES]


def gradients(step, dtype=np.float32):
    """A deterministic, noisy stream over several magnitudes, some exactly zero."""
    random = np.random.default_rng(1000 + step)
    result = [random.standard_normal(shape) * 10.0 ** (-i) for i, shape in enumerate(SHAPES)]
    result[2][:, 0] = 0.0
    return [gradient.astype(dtype) for gradient in result]


def rates(step):
    return 3e-3 * (0.55 + 0.45 * math.cos(step / 200))


def run(framework, settings, steps, dtype=np.float32, scale=1.0):
    optimizer = framework.optimizer(parameters(dtype), DECAYS, settings)
    for t in range(1, steps + 1):
        optimizer.step(gradients(t, dtype), rates(t), scale)
    return optimizer


def by_the_paper(settings, steps, scale=1.0):
    """Kingma & Ba 2015, algorithm 1 and the end of section 2, with decoupled decay; float64."""
    theta = [values.astype(np.float64) for values in parameters(np.float64)]
    m = [np.zeros_like(p) for p in theta]
    v = [np.zeros_like(p) for p in theta]
    for t in range(1, steps + 1):
        lr = rates(t)
        for i, g in enumerate(gradients(t, np.float64)):
            g = g * scale
            m[i] = settings.beta1 * m[i] + (1 - settings.beta1) * g
            v[i] = settings.beta2 * v[i] + (1 - settings.beta2) * g * g
            if DECAYS[i]:
                theta[i] = theta[i] - lr * settings.weight_decay * theta[i]
            if settings.bias_correction == "efficient":
                alpha = lr * np.sqrt(1 - settings.beta2**t) / (1 - settings.beta1**t)
                theta[i] = theta[i] - alpha * m[i] / (np.sqrt(v[i]) + settings.epsilon)
            else:
                m_hat, v_hat = m[i] / (1 - settings.beta1**t), v[i] / (1 - settings.beta2**t)
                theta[i] = theta[i] - lr * m_hat / (np.sqrt(v_hat) + settings.epsilon)
    return theta
