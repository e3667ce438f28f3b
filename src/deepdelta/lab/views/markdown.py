"""The tables of studies as a Markdown file each: what stands beside the JSON that they are made from."""

from collections.abc import Mapping

from deepdelta.lab.analysis.results import StudyResults
from deepdelta.lab.analysis.scaling import Scaling
from deepdelta.lab.experiments.search import SearchResults
from deepdelta.lab.views.details import detail_tables, scaling_table, search_table, tuning_table
from deepdelta.lab.views.table import table_cells
from deepdelta.lab.views.tables import markdown_page


def study_markdown(results: StudyResults) -> str:
    """All tables of a study, with what their figures depend on."""
    facts = results.facts(results.finished)
    validated = f"validated on {results.validation.tokens:,} tokens, {results.validation.contexts}"
    text = f"{results.corpus.description} (SHA-256 {results.corpus.sha256[:12]}); {validated}"
    seeds = f"Seeds {', '.join(map(str, results.seeds))}. {text}."
    return markdown_page(
        f"{results.name}: {results.description}", (facts, seeds), (table_cells(results), *detail_tables(results))
    )


def search_markdown(found: SearchResults) -> str:
    """The rungs of a search, and the learning rates that its candidates were given."""
    facts = found.facts(found.finished)
    seeds = "; ".join(f"{rung.steps} steps on seeds {', '.join(map(str, rung.seeds))}" for rung in found.rungs)
    text = f"Rungs: {seeds}. {found.corpus.description} (SHA-256 {found.corpus.sha256[:12]})."
    tables = (search_table(found), tuning_table(found.tuned))
    return markdown_page(f"Search {found.name}", (facts, text), [table for table in tables if table is not None])


def scaling_markdown(found: Scaling, studies: Mapping[str, StudyResults]) -> str:
    """The laws, then the tables of the study at every size."""
    pages = [
        study_markdown(results).replace("\n### ", "\n#### ").replace("# ", "## ", 1) for results in studies.values()
    ]
    laws = markdown_page(f"Sizes {found.name}", (found.facts(found.finished),), (scaling_table(found),))
    return "\n".join([laws, *pages])
