/** All devices: how many are there and well, and each on a line. */
import { Link, useNavigate, useSearch } from "@tanstack/react-router";
import {
  createColumnHelper, getCoreRowModel, getSortedRowModel, useReactTable, type ColumnDef, type RowSelectionState, type SortingState, type VisibilityState,
} from "@tanstack/react-table";
import { useVirtualizer } from "@tanstack/react-virtual";
import { useDeferredValue, useEffect, useMemo, useRef, useState, useSyncExternalStore } from "react";
import { Checkbox, DialogTrigger, Popover, SearchField, Input, Label, Dialog } from "react-aria-components";
import { useApp, type App, type Row } from "./api";
import { facets, FleetStore, matching, type Filters } from "./fleet";
import { count } from "./format";
import { texts } from "./texts";
import { Button, Choice, Confirm, Dot, Failure, Loading, Moment } from "./ui";

const t = texts.devices;
const stores = new WeakMap<App, FleetStore>();

export function useFleet() {
  const app = useApp();
  let store = stores.get(app);
  if (!store) stores.set(app, (store = new FleetStore(app)));
  return { store, fleet: useSyncExternalStore(store.listen, store.get) };
}

const column = createColumnHelper<Row>();
const byText = (a: string, b: string) => (a < b ? -1 : a > b ? 1 : 0); // a locale's order takes seconds for 100 000

// eslint-disable-next-line @typescript-eslint/no-explicit-any -- each column has values of its own
const columns: ColumnDef<Row, any>[] = [
  column.accessor("name", {
    header: t.name, enableHiding: false, sortingFn: (a, b) => byText(a.original.name.toLowerCase(), b.original.name.toLowerCase()),
    cell: (c) => <Link to="/devices/$id" params={{ id: c.row.original.id }}>{c.getValue() || t.unnamed}</Link>,
  }),
  column.accessor("online", { header: t.state, cell: (c) => <Dot on={c.getValue()} /> }),
  column.accessor("connectedAt", { header: t.since, cell: (c) => <Moment at={c.getValue()} /> }),
  column.accessor((r) => r.types.join(", "), { id: "types", header: t.types, sortingFn: (a, b) => byText(a.original.types.join(), b.original.types.join()) }),
  column.accessor("model", { header: t.model }),
  column.accessor("protocol", { header: t.protocol, cell: (c) => texts.protocol[c.getValue()] ?? c.getValue() }),
  column.accessor("twin", { header: t.twin, cell: (c) => (c.getValue() ? texts.sync[c.row.original.sync] : t.twinOff) }),
  column.accessor((r) => Object.entries(r.labels).map(([k, v]) => `${k}=${v}`).join(", "), { id: "labels", header: t.labels }),
  column.accessor("id", { header: t.id, cell: (c) => <code>{c.getValue()}</code> }),
];

const columnsKey = "coaphub.columns";

function keptColumns(): VisibilityState {
  try {
    return JSON.parse(localStorage.getItem(columnsKey) ?? "") as VisibilityState;
  } catch {
    return { model: false, protocol: false, twin: false, labels: false, ...(matchMedia("(max-width: 45rem)").matches ? { types: false, id: false, connectedAt: false } : {}) };
  }
}

export function DevicesPage() {
  const { session, hub } = useApp();
  const { fleet } = useFleet();
  const asked = useSearch({ from: "/" });
  const navigate = useNavigate();
  const [words, setWords] = useState(asked.q ?? "");
  const filters: Filters = { words: useDeferredValue(words), status: (asked.status ?? "") as Filters["status"], type: asked.type ?? "", label: asked.label ?? "" };
  const set = (change: Partial<Record<"q" | "status" | "type" | "label", string>>) =>
    void navigate({ to: "/", replace: true, search: (old) => Object.fromEntries(Object.entries({ ...old, ...change }).filter(([, v]) => v !== "")) });
  useEffect(() => {
    const timer = setTimeout(() => set({ q: words }), 300); // the address holds what is searched, for a bookmark
    return () => clearTimeout(timer);
    // eslint-disable-next-line
  }, [words]);

  const shown = useMemo(() => matching(fleet.rows, filters), [fleet.rows, filters.words, filters.status, filters.type, filters.label]);
  const { types, labels } = useMemo(() => facets(fleet.rows), [fleet.rows]);
  const [sorting, setSorting] = useState<SortingState>([{ id: "name", desc: false }]);
  const [visible, setVisible] = useState(keptColumns);
  const [selected, setSelected] = useState<RowSelectionState>({});
  useEffect(() => localStorage.setItem(columnsKey, JSON.stringify(visible)), [visible]);
  const table = useReactTable({
    data: shown as Row[], columns, state: { sorting, columnVisibility: visible, rowSelection: selected }, getRowId: (r) => r.id, onSortingChange: setSorting,
    onColumnVisibilityChange: setVisible, onRowSelectionChange: setSelected, getCoreRowModel: getCoreRowModel(), getSortedRowModel: getSortedRowModel(), autoResetAll: false,
  });
  const chosen = useMemo(() => {
    const there = new Set(fleet.rows.map((r) => r.id));
    return Object.keys(selected).filter((id) => selected[id] && there.has(id));
  }, [selected, fleet.rows]);
  const [deleting, setDeleting] = useState(false);
  const [done, setDone] = useState(0);
  const removeAll = async () => {
    try {
      for (let i = 0; i < chosen.length; i += 100) {
        setDone(i);
        await hub.api.DELETE("/api/v1/devices", { params: { query: { deviceIdFilter: chosen.slice(i, i + 100) } } });
      }
      setSelected({});
    } finally {
      setDone(0);
    }
  };

  return (
    <div className="devices">
      <h1>{t.title}</h1>
      <Counters total={fleet.rows.length} online={fleet.online} onPick={(status) => set({ status })} />
      <div className="filters" role="search">
        <SearchField className="field search" value={words} onChange={setWords}>
          <Label className="hidden">{t.search}</Label>
          <Input placeholder={t.search} spellCheck={false} />
        </SearchField>
        <Choice label={t.state} hidden value={filters.status} onChange={(status) => set({ status })} options={[["", t.anyState], ["online", t.online], ["offline", t.offline]]} />
        <Choice label={t.types} hidden value={filters.type} onChange={(type) => set({ type })} options={[["", t.anyType], ...types.map((x) => [x, x] as const)]} />
        {labels.length > 0 && (
          <Choice label={t.labels} hidden value={filters.label} onChange={(label) => set({ label })} options={[["", t.anyLabel], ...labels.map((x) => [x, x] as const)]} />
        )}
        <DialogTrigger>
          <Button className="small">{t.columns}</Button>
          <Popover>
            <Dialog className="columns" aria-label={t.columns}>
              {table.getAllLeafColumns().filter((c) => c.getCanHide()).map((c) => (
                <label key={c.id}><input type="checkbox" checked={c.getIsVisible()} onChange={(e) => c.toggleVisibility(e.target.checked)} /> {String(c.columnDef.header)}</label>
              ))}
            </Dialog>
          </Popover>
        </DialogTrigger>
        <span className="result" role="status">
          {fleet.loading ? t.loadingSoFar(count(fleet.rows.length)) : t.of(count(shown.length), count(fleet.rows.length))}
        </span>
      </div>
      {chosen.length > 0 && (
        <div className="bulk" role="status">
          {done > 0 ? t.deleting(done, chosen.length) : t.selected(chosen.length)}
          <Button className="small" onPress={() => setSelected({})}>{t.unselect}</Button>
          {session.may("write") && <Button className="small danger" onPress={() => setDeleting(true)}>{t.delete}</Button>}
        </div>
      )}
      <Confirm
        title={t.delete} text={t.confirmMany(chosen.length)} word={String(chosen.length)} action={t.delete} open={deleting} onClose={() => setDeleting(false)} run={removeAll}
      />
      <Failure error={fleet.error} />
      {fleet.rows.length === 0 ? (
        fleet.loading ? <Loading /> : <div className="empty"><p>{t.empty}</p><p>{t.emptyMore}<code>coaphub simulate --devices 10</code></p></div>
      ) : shown.length === 0 ? (
        <div className="empty"><p>{t.nothing}</p><Button onPress={() => { setWords(""); set({ q: "", status: "", type: "", label: "" }); }}>{t.clear}</Button></div>
      ) : (
        <Table table={table} selectable={session.may("write")} />
      )}
    </div>
  );
}

function Counters({ total, online, onPick }: { total: number; online: number; onPick: (status: string) => void }) {
  const share = total === 0 ? 0 : (100 * online) / total;
  return (
    <div className="counters">
      <Button className="counter" onPress={() => onPick("")}><b>{count(total)}</b> {t.total}</Button>
      <Button className="counter on" onPress={() => onPick("online")}><b>{count(online)}</b> {t.online}</Button>
      <Button className="counter off" onPress={() => onPick("offline")}><b>{count(total - online)}</b> {t.offline}</Button>
      <svg className="states" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label={`${t.chart}: ${share.toFixed(0)} % ${t.online}`}>
        <rect width="100" height="8" className="off" />
        <rect width={share} height="8" className="on" />
      </svg>
    </div>
  );
}

const rowHeight = 40;

function Table({ table, selectable }: { table: ReturnType<typeof useReactTable<Row>>; selectable: boolean }) {
  const { rows } = table.getRowModel();
  const scroll = useRef<HTMLDivElement>(null);
  const virtual = useVirtualizer({ count: rows.length, getScrollElement: () => scroll.current, estimateSize: () => rowHeight, overscan: 12 });
  const items = virtual.getVirtualItems();
  const before = items[0]?.start ?? 0;
  const after = virtual.getTotalSize() - (items.at(-1)?.end ?? 0);
  const width = table.getVisibleLeafColumns().length + Number(selectable);
  return (
    <div className="scroll" ref={scroll} tabIndex={0} role="region" aria-label={t.table}>
      <table aria-rowcount={rows.length + 1}>
        <thead>
          <tr aria-rowindex={1}>
            {selectable && (
              <th className="pick">
                <Checkbox aria-label={t.selectAll} isSelected={table.getIsAllRowsSelected()} isIndeterminate={table.getIsSomeRowsSelected()} onChange={(on) => table.toggleAllRowsSelected(on)}>
                  <span className="box" />
                </Checkbox>
              </th>
            )}
            {table.getLeafHeaders().map((h) => {
              const sorted = h.column.getIsSorted();
              return (
                <th key={h.id} className={h.id} aria-sort={sorted === "asc" ? "ascending" : sorted === "desc" ? "descending" : "none"}>
                  <Button className="sort" aria-label={t.sortBy(String(h.column.columnDef.header))} onPress={() => h.column.toggleSorting()}>
                    {String(h.column.columnDef.header)} <span aria-hidden="true">{sorted === "asc" ? "▲" : sorted === "desc" ? "▼" : ""}</span>
                  </Button>
                </th>
              );
            })}
          </tr>
        </thead>
        <tbody>
          {before > 0 && <tr aria-hidden="true"><td colSpan={width} style={{ height: before, padding: 0 }} /></tr>}
          {items.map((item) => {
            const row = rows[item.index]!;
            return (
              <tr key={row.id} aria-rowindex={item.index + 2} className={row.getIsSelected() ? "picked" : ""}>
                {selectable && (
                  <td className="pick">
                    <Checkbox aria-label={t.select(row.original.name || row.id)} isSelected={row.getIsSelected()} onChange={(on) => row.toggleSelected(on)}><span className="box" /></Checkbox>
                  </td>
                )}
                {row.getVisibleCells().map((cell) => {
                  const show = cell.column.columnDef.cell;
                  return <td key={cell.id} className={cell.column.id}>{typeof show === "function" ? (show as (c: unknown) => React.ReactNode)(cell.getContext()) : String(cell.getValue())}</td>;
                })}
              </tr>
            );
          })}
          {after > 0 && <tr aria-hidden="true"><td colSpan={width} style={{ height: after, padding: 0 }} /></tr>}
        </tbody>
      </table>
    </div>
  );
}
