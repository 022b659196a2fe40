# mypy: allow-untyped-defs, allow-incomplete-defs
"""Sine, cosine and angle in float32 for Triton kernels, within two units in the last place.

The approximations are those of the Cephes library. CUDA's own sine takes any argument on a slow path with
memory of its own, and its fast one is wrong by 1e-5 at the fifty radians and more of a basis.
"""

import triton
import triton.language as tl

# pi / 2 in three parts, of which multiples up to 65536 of the first two are exact
_HALF_PI_1 = tl.constexpr(1.5703125)
_HALF_PI_2 = tl.constexpr(4.837512969970703125e-4)
_HALF_PI_3 = tl.constexpr(7.549789954891882e-8)


@triton.jit
def sine_and_cosine(x):
    """Return both, for |x| up to 1e5."""
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    quarter = turns.to(tl.int32)
    x = ((x - turns * _HALF_PI_1) - turns * _HALF_PI_2) - turns * _HALF_PI_3
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)
    cosine = 1 - 0.5 * z + z * z * cosine
    exchanged = (quarter & 1) == 1
    new_sine = tl.where(exchanged, cosine, sine)
    new_cosine = tl.where(exchanged, sine, cosine)
    new_sine = tl.where((quarter & 2) == 2, -new_sine, new_sine)
    return new_sine, tl.where(((quarter + 1) & 2) == 2, -new_cosine, new_cosine)


@triton.jit
def angle(sine, cosine):
    """Return atan2 where the sine is positive: an angle from 0 to pi."""
    modulus = tl.abs(cosine)
    t = tl.div_rn(tl.minimum(sine, modulus), tl.maximum(sine, modulus))
    steep = t > 0.4142135623730951
    t = tl.where(steep, tl.div_rn(t - 1, t + 1), t)
    z = t * t
    series = -3.33329491539e-1 + z * (1.99777106478e-1 + z * (-1.38776856032e-1 + z * 8.05374449538e-2))
    found = tl.where(steep, 0.7853981633974483, 0.0) + (t + t * z * series)
    found = tl.where(sine > modulus, 1.5707963267948966 - found, found)
    return tl.where(cosine < 0, 3.141592653589793 - found, found)
