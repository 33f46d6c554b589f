"""The figure of all methods; its table is in tests/launch/test_study.py."""

from ddil_jax.evaluation import family


def test_methods_beyond_the_colours_look_different():
  names = [f"method_{i:02}" for i in range(25)]
  lines = [family.Line("All", name, 1.0, 4, variant, {4: {0: 1.0 + i}}, {}, {4: 4.0}, {}, 0.1, 1.0, {4: 10.0 + i})
           for i, name in enumerate(names) for variant in ("base", "+ddil")]
  figure = family.draw(lines, {(4, 1.0): 5.0}).figure
  legend, = (axis.get_legend() for axis in figure.axes if axis.get_legend())
  looks = {text.get_text(): (handle.get_color(), handle.get_marker())
           for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}
  assert list(looks) == names and len(set(looks.values())) == len(names)
  above = [drawn for drawn in figure.axes[0].lines if drawn.get_linestyle() in ("-", "--")]
  shown = [(drawn.get_color(), drawn.get_marker()) for drawn in above]
  assert shown == [looks[line.method] for line in lines]  # base and +DDIL alike, told apart by their line
  assert [drawn.get_linestyle() for drawn in above] == ["-", "--"] * len(names)
