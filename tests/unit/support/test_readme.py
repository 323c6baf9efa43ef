"""Examples are found with their output."""

from __future__ import annotations

import pytest

from tests.support.readme import Example, matches, read_examples

DOCUMENT = """# Title

```python
print(1)
```

```text
1
```

Text.

```console
$ not run
```

```sh
true
```

In between.

```text
not its output
```
"""


def test_read_examples_when_output_follows_then_it_belongs_to_the_block() -> None:
    assert read_examples(DOCUMENT) == [
        Example("python", "print(1)\n", 3, "1\n"),
        Example("sh", "true\n", 17, None),
    ]


@pytest.mark.parametrize(
    ("got", "same"), [("a 12 ms\n", True), ("a  ms\n", True), ("a 1\n2 ms\n", False), ("b 12 ms\n", False)]
)
def test_matches_when_a_dash_of_dots_stands_for_anything_then_the_rest_counts(got: str, same: bool) -> None:
    assert matches("a … ms\n", got) is same
