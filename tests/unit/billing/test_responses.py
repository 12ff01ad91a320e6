"""Test pages of reports as CSV."""

import re
from urllib.parse import parse_qs, urlsplit

from litestar.testing import RequestFactory

from services.billing.responses import answer


def test_the_link_to_the_next_csv_page_encodes_the_query() -> None:
    query = {"model": "a&b+c%d", "label": ["x=y z", "ü"]}
    request = RequestFactory().get("/v1/usage", headers={"accept": "text/csv"}, query_params=query)
    response = answer(request, [], ["model"], lambda _: [], following="c&1")
    found = re.fullmatch(r'<([^>]+)>; rel="next"', response.headers["Link"])
    assert found is not None
    address = urlsplit(found[1])
    assert address.path == "/v1/usage"
    assert parse_qs(address.query) == {"model": ["a&b+c%d"], "label": ["x=y z", "ü"], "cursor": ["c&1"]}
