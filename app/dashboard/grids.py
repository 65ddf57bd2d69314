"""Tables: AG Grid with the settings that every page shares."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dash.development.base_component import Component


def grid(
    id: str,
    columns: Sequence[Mapping[str, Any]],
    *,
    key: str,
    label: str,
    choose: str | None = None,
    height: int = 480,
) -> "Component":
    """An empty table.

    Args:
        id: of the component.
        columns: AG Grid column definitions; texts are drawn as texts, never as markup.
        key: field that tells rows apart.
        label: what the table holds, for screen readers.
        choose: `multiRow` or `singleRow`, or None.
        height: in pixels.
    """
    import dash_ag_grid as dag
    from dash import html

    options: dict[str, Any] = {
        "suppressFieldDotNotation": True, "animateRows": False, "tooltipShowDelay": 300,
        "enableCellTextSelection": True, "ensureDomOrder": True, "rowHeight": 30,
        "headerHeight": 34,
    }  # fmt: skip
    if choose:
        options["rowSelection"] = {
            "mode": choose, "checkboxes": True, "headerCheckbox": False,
            "enableClickSelection": False,
        }  # fmt: skip
        options["selectionColumnDef"] = {"headerName": "Take", "width": 74}
    return html.Div(
        dag.AgGrid(
            id=id,
            columnDefs=[dict(c) for c in columns],
            rowData=[],
            getRowId=f"params.data[{key!r}]",
            defaultColDef={"sortable": True, "filter": True, "resizable": True,
                           "tooltipField": None},
            dashGridOptions=options,
            dangerously_allow_code=False,
            style={"height": height, "width": "100%"},
        ),
        role="region", **{"aria-label": label},
    )  # fmt: skip


def link_column(field: str, name: str, to: str, *, width: int = 200) -> dict[str, Any]:
    """A column whose cells are links; `{}` in `to` stands for the value."""
    return {
        "field": field, "headerName": name, "width": width, "cellRenderer": "HeadscopeLink",
        "cellRendererParams": {"to": to}, "pinned": "left",
    }  # fmt: skip


def number_column(field: str, name: str, *, width: int = 115, digits: int = 4) -> dict[str, Any]:
    """A column of numbers."""
    return {
        "field": field, "headerName": name, "width": width, "type": "numericColumn",
        "filter": "agNumberColumnFilter",
        "valueFormatter": {"function": "params.value == null ? '–' : params.value != 0 && "
                                       "params.value < 0.001 && params.value > -0.001 ? "
                                       f"d3.format('.2~e')(params.value) : "
                                       f"d3.format('.{digits}~g')(params.value)"},
    }  # fmt: skip
