import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.data import cleaning


@given(st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_normalising_twice_changes_nothing_more(text):
  once = cleaning.normalise(text)
  assert cleaning.normalise(once) == once
  assert "\r" not in once and "\n\n\n" not in once


def test_code_keeps_its_indentation_and_inner_spaces():
  code = "def f(x):\n\tif x:\n    return  1\n"
  assert cleaning.normalise(code) == code


@pytest.mark.parametrize(
  "page, expected",
  [
    ("<p>a<br>b</p><p>c</p>", "a\nb\n\nc\n"),
    ("<ul><li>one</li><li>two</li></ul>", "one\n\ntwo\n"),
    ("<nav><div>menu<div>x</div></div></nav><p>text</p>", "text\n"),
    ("<ul class='docnav'><li>Prev</li></ul>text", "text\n"),
    ("a &lt;b&gt; &amp; &eacute; &#8212;", "a <b> & é —\n"),
    ("<pre>x  y\n  z</pre>", "x  y\n  z\n"),
    ("<div>side</div><div class='b' role=\"main\"><p>body</p></div>", "body\n"),
    ("<p>one <i>two</i>\n three</p>", "one two three\n"),
    ("<style>p{}</style><script>if (a < b) {}</script>kept", "kept\n"),
    ("<img src=x><hr/>end", "end\n"),
    ("", ""),
  ],
)
def test_html(page, expected):
  assert cleaning.html_to_text(page) == expected


@pytest.mark.parametrize(
  "page, expected",
  [
    ('.\\" a comment\n.TH T 1\ntext', "text\n"),
    (".SH SEE ALSO\n.BR open (2),\n.BR close (2)", "SEE ALSO\nopen(2),\nclose(2)\n"),
    ("\\fIfile\\fP \\- \\(em \\(aqq\\(aq", "file - — 'q'\n"),
    ('.B "two words"\n.RI a b c', "two words\nabc\n"),
    (".IP \\(bu 3\npoint", "•\npoint\n"),
    ("a\\eb \\& c\\|d", "a\\b  cd\n"),
  ],
)
def test_manual_pages(page, expected):
  assert cleaning.roff_to_text(page) == expected


def test_repeated_lines_stay_once_and_short_ones_always():
  long = "this boilerplate is long enough to count as one"
  texts = cleaning.drop_repeated_lines([f"{long}\n}}\n", f"}}\n  {long}  \nown\n"])
  assert texts == [f"{long}\n}}\n", "}\nown\n"]


def test_width_must_be_positive():
  with pytest.raises(ValueError, match="width is 0"):
    cleaning.drop_repeated_lines([], width=0)
