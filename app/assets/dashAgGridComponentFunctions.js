/* Cells of tables that are links. React makes the text of them: nothing is read as markup. */
(function () {
  "use strict";
  const dag = (window.dashAgGridComponentFunctions = window.dashAgGridComponentFunctions || {});
  dag.HeadscopeLink = function (props) {
    if (props.value === null || props.value === undefined) return null;
    // A row may say where it leads; the rest of it is text.
    const own = props.data && props.data.to;
    const to = typeof own === "string" && /^\/[^/]/.test(own) ? own : props.to.replace("{}", encodeURIComponent(props.value));
    return window.React.createElement("a", {href: to}, String(props.value));
  };
  dag.HeadscopeHead = function (props) {
    if (!props.value) return null;
    const hs = window.headscope;
    const parts = hs.head_parts(props.value);
    const target = {...hs.state, page: "head", layer: parts.layer, head: parts.head, tower: parts.tower};
    return window.React.createElement("a", {href: hs.url(target)}, String(props.value));
  };
})();
