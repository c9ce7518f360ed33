"""What the documents say of the quickstart is what it prints."""

from figures import quickstart_tables, shortened

PRINTED = """step 50/50: loss 0.0029
Before:
python scripts/bookings.py --score true --n 2
> A table for two.
{
  "name": "A" (wrong)
> Another.
Sure! (wrong)
new names and places: 0 of 2 valid JSON, 0 exact
> A third.
No. (wrong)
new wordings, too: 0 of 2 valid JSON, 0 exact

Before, with three examples shown first:
new names and places: 2 of 2 valid JSON, 1 exact
new wordings, too: 1 of 2 valid JSON, 1 exact

After:
> A table for two.
{"people": 2} (right)
> Another.
{"people": 3} (wrong)
new names and places: 4 of 4 valid JSON, 3 exact
> A third.
{} (right)
new wordings, too: 4 of 4 valid JSON, 2 exact
"""


def test_scores_answers_and_an_error_are_read() -> None:
    lines = quickstart_tables(PRINTED).splitlines()
    assert lines[2:5] == [
        "| before | 0% of 4 | 0% | 0% |",
        "| before, with three examples shown first | 75% of 4 | 50% | 50% |",
        "| after | 100% of 8 | 75% | 50% |",
    ]
    told = '*A table for two.* Before: `{ "name": "A"` After: `{"people": 2}`'
    assert lines[6] == told + ' One of its errors: *Another.* `{"people": 3}`'
    assert len(shortened("x" * 100)) == 82
