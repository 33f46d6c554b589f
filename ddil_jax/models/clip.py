"""CLIP: image and text towers in one space."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddil_jax.models import preprocess
from ddil_jax.types import Array

ACTIVATIONS = {"quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
               "gelu": lambda x: jax.nn.gelu(x, approximate=False)}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_EXACT = dict(precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Tower:
  """A transformer's sizes; `eps` is of its layer norms, `activation` one of ACTIVATIONS."""
  width: int
  hidden: int
  layers: int
  heads: int
  activation: str = "quick_gelu"
  eps: float = 1e-5


class CLIP(nn.Module):
  """images [B,H,W,C] in [-1, 1], tokens int [K,T] or None -> (logits [B,K], image features [B,D]).

      logits_ij = exp(s) cos(image_i, text_j);   K = 0 without tokens

  Features are projected, not normalised. Names of sub-modules are those of the published weights in the layout of
  Hugging Face. Sizes of clip-vit-base-patch32: vision Tower(768, 3072, 12, 12), text Tower(512, 2048, 12, 8), dim 512.

  Attributes:
    vision, text: sizes of the towers.
    dim: D, of the common space.
    size: of the square that the vision tower reads.
    patch: of a patch of it.
    vocabulary, length: number of tokens there are, and of those in a text at most.
    end: token at which a text is read off (its first one); None takes the largest token.
    mean, std: of the three channels in [0, 1].
    quantise: round images to 8-bit levels first, as if they came from files, and again when they are resized.

  Source: Radford et al. 2021 (arXiv 2103.00020).
  """
  vision: Tower
  text: Tower
  dim: int
  size: int = 224
  patch: int = 32
  vocabulary: int = 49408
  length: int = 77
  end: int | None = None
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  quantise: bool = True

  def setup(self):
    self.vision_model = Vision(self.vision, self.size, self.patch)
    self.text_model = Text(self.text, self.vocabulary, self.length, self.end)
    self.visual_projection = nn.Dense(self.dim, use_bias=False, **_EXACT)
    self.text_projection = nn.Dense(self.dim, use_bias=False, **_EXACT)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), (1,))

  def __call__(self, images: Array, tokens: Array | None = None) -> tuple[Array, Array]:
    features = self.image_features(images)
    if tokens is None:
      return features[:, :0], features
    a, b = _unit(features), _unit(self.text_features(tokens))
    return jnp.exp(self.logit_scale)[:, None] * jnp.einsum("id,jd->ij", a, b, **_EXACT), features

  def image_features(self, images: Array) -> Array:
    """images [B,H,W,C] in [-1, 1] -> [B,D]."""
    return self.visual_projection(self.vision_model(self.pixels(images)))

  def text_features(self, tokens: Array) -> Array:
    """tokens int [K,T], T <= `length`, with begin and end, padded at the right -> [K,D]."""
    return self.text_projection(self.text_model(tokens).pooled)

  def pixels(self, images: Array) -> Array:
    """The shorter side to `size` by Pillow's bicubic, the centre square, (x - mean) / std -> [B,size,size,3]."""
    x = preprocess.levels(images, self.quantise)
    h, w = x.shape[1:3]
    height, width = (self.size * h // min(h, w), self.size * w // min(h, w))
    x = preprocess.bicubic(x, height, width, self.quantise)
    top, left = (height - self.size) // 2, (width - self.size) // 2
    x = x[:, top:top + self.size, left:left + self.size]
    mean, std = (jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 3) for v in (self.mean, self.std))
    return (x / 255 - mean) / std


def _unit(x):
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Vision(nn.Module):
  """pixels [B,size,size,3] -> the class token after the last layer [B,width]."""
  tower: Tower
  size: int
  patch: int

  @nn.compact
  def __call__(self, pixels: Array) -> Array:
    x = Patches(self.tower.width, self.patch, name="embeddings")(pixels)
    x = nn.LayerNorm(self.tower.eps, name="pre_layrnorm")(x)  # spelt so in the published weights
    x, _ = Encoder(self.tower, name="encoder")(x)
    return nn.LayerNorm(self.tower.eps, name="post_layernorm")(x[:, 0])


class Patches(nn.Module):
  """pixels [B,size,size,3] -> a class token and one token per patch, with their positions [B,1+N,width]."""
  width: int
  patch: int

  @nn.compact
  def __call__(self, pixels: Array) -> Array:
    side = (self.patch, self.patch)
    x = nn.Conv(self.width, side, side, "VALID", use_bias=False, name="patch_embedding", **_EXACT)(pixels)
    x = x.reshape(len(x), -1, self.width)
    first = self.param("class_embedding", nn.initializers.normal(0.02), (self.width,))
    x = jnp.concatenate([jnp.broadcast_to(first.reshape(1, 1, -1), (len(x), 1, self.width)), x], axis=1)
    return x + nn.Embed(x.shape[1], self.width, name="position_embedding")(jnp.arange(x.shape[1]))[None]


class TextStates(NamedTuple):
  """What text encoders give: states of all tokens, of which Stable Diffusion 1 and 2 read the last, SDXL the other.

  Attributes:
    last: [K,T,width], after the last layer, normalised.
    penultimate: [K,T,width], before the last layer, not normalised.
    pooled: [K,width], or [K,dim] where there is a projection: the end token after the last layer.
  """
  last: Array
  penultimate: Array
  pooled: Array


class Text(nn.Module):
  """tokens int [K,T] -> TextStates; no token sees those after it."""
  tower: Tower
  vocabulary: int
  length: int
  end: int | None

  @nn.compact
  def __call__(self, tokens: Array) -> TextStates:
    x = Tokens(self.tower.width, self.vocabulary, self.length, name="embeddings")(tokens)
    x, penultimate = Encoder(self.tower, causal=True, name="encoder")(x)
    x = nn.LayerNorm(self.tower.eps, name="final_layer_norm")(x)
    at = jnp.argmax(tokens if self.end is None else tokens == self.end, axis=-1)
    return TextStates(x, penultimate, jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0])


class TextEncoder(nn.Module):
  """The text tower alone, as the folders of diffusers have it: tokens int [K,T] -> TextStates.

  Attributes:
    tower, vocabulary, length, end: as of CLIP.
    dim: of the projection of the pooled state (SDXL's second encoder); None is none.
  """
  tower: Tower
  vocabulary: int = 49408
  length: int = 77
  end: int | None = None
  dim: int | None = None

  def setup(self):
    self.text_model = Text(self.tower, self.vocabulary, self.length, self.end)
    if self.dim is not None:
      self.text_projection = nn.Dense(self.dim, use_bias=False, **_EXACT)

  def example(self) -> tuple:
    """Shapes of the arguments of `init`."""
    return (jax.ShapeDtypeStruct((1, self.length), jnp.int32),)

  def __call__(self, tokens: Array) -> TextStates:
    states = self.text_model(tokens)
    return states if self.dim is None else states._replace(pooled=self.text_projection(states.pooled))


class Tokens(nn.Module):
  """tokens int [K,T] -> their embeddings with their positions [K,T,width]."""
  width: int
  vocabulary: int
  length: int

  @nn.compact
  def __call__(self, tokens: Array) -> Array:
    positions = nn.Embed(self.length, self.width, name="position_embedding")(jnp.arange(tokens.shape[1]))
    return nn.Embed(self.vocabulary, self.width, name="token_embedding")(tokens) + positions[None]


class Encoder(nn.Module):
  """x [B,N,width] -> the same after all layers, and before the last one.

  A layer is attention and a multilayer perceptron, with a norm before each.

  Attributes:
    causal: no token sees those after it.
  """
  tower: Tower
  causal: bool = False

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    before = x
    for i in range(self.tower.layers):
      before, x = x, Layer(self.tower, self.causal, name=f"layers_{i}")(x)
    return x, before


class Layer(nn.Module):
  tower: Tower
  causal: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    t = self.tower
    x = x + Attention(t.heads, self.causal, name="self_attn")(nn.LayerNorm(t.eps, name="layer_norm1")(x))
    return x + Mlp(t.hidden, t.activation, name="mlp")(nn.LayerNorm(t.eps, name="layer_norm2")(x))


class Attention(nn.Module):
  heads: int
  causal: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    b, n, width = x.shape
    part = lambda name: nn.Dense(width, name=name, **_EXACT)(x).reshape(b, n, self.heads, -1)  # noqa: E731
    with jax.default_matmul_precision("highest"):  # of which that function has no argument
      out = jax.nn.dot_product_attention(part("q_proj"), part("k_proj"), part("v_proj"), is_causal=self.causal)
    return nn.Dense(width, name="out_proj", **_EXACT)(out.reshape(b, n, width))


class Mlp(nn.Module):
  hidden: int
  activation: str

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h = ACTIVATIONS[self.activation](nn.Dense(self.hidden, name="fc1", **_EXACT)(x))
    return nn.Dense(x.shape[-1], name="fc2", **_EXACT)(h)
