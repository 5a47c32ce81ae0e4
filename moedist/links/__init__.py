"""Links between ranks: known bytes over the transport that rows take, before training relies on it.

`pairs` chooses what is tested, `pattern` makes the bytes, `walk` sends them and says where it got stuck, `facts` judges what
was found; `start_check` is the short test before a training, `moedist.show_links` the long one for people.
"""

from moedist.links.facts import LinkFacts, facts_to_json
from moedist.links.pairs import choose_pairs
from moedist.links.start_check import check_links, link_test_wanted
from moedist.links.walk import Depth, measure_links

__all__ = ["Depth", "LinkFacts", "check_links", "choose_pairs", "facts_to_json", "link_test_wanted", "measure_links"]
