package grpcgateway

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// counted makes the directory say how many devices were read, and lets them change only when changed is called.
func counted(w *world) (reads *int, changed func(hub.DeviceID)) {
	n, number := 0, map[hub.DeviceID]uint64{}
	devices := w.directory.devices
	w.directory.devices = func(ctx context.Context, o hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		n += len(ids)
		return devices(ctx, o, ids)
	}
	w.directory.changes = func(id hub.DeviceID) uint64 { return number[id] }
	return &n, func(id hub.DeviceID) { number[id]++ }
}

// Once the devices are known, searching and sorting read only those that are sent, until one changes.
func TestSearchAndSortReadOnlyWhatTheySend(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fleet(w, 200)
	reads, changed := counted(w)
	get := func(query string, elements, read int) []map[string]any {
		t.Helper()
		*reads = 0
		rs := w.get(t, "/api/v1/devices?"+query).results()
		want(t, query+": elements", len(rs), elements)
		want(t, query+": devices read", *reads, read)
		return rs
	}
	get("sort=name&limit=10", 10, 200+11) // one more, to know whether there is a next page
	get("sort=name&limit=10", 10, 11)
	get("sort=-connectedAt&limit=5", 5, 6)
	get("search=000000000007", 1, 1)
	get("search=nothing", 0, 0)
	get("search=zo&sort=name&status=OFFLINE&limit=3", 3, 4)
	get("sort=name&deviceIdFilter="+string(lampA), 0, 1) // unknown

	const one hub.DeviceID = "d2000000-0000-4000-8000-000000000007"
	w.pictures[one] = later(lamp(one, "aaa", true))
	w.pictures[one].Labels = hub.Labels{"room": "attic"}
	get("search=attic", 0, 0) // it has not said so yet
	changed(one)
	get("search=attic", 1, 1) // what is read to be searched is what is sent
	get("search=attic", 1, 1)
	rs := get("sort=name&limit=1&search=a", 1, 2)
	want(t, "the first by name is another", rs[0]["id"] != any(string(one)), true) // names can be empty
	get("search=aaa&sort=name", 1, 1)
	delete(w.pictures, one)
	changed(one)
	get("search=attic", 0, 0) // it is nobody's any more, whatever the index says
}

// A device that is another owner's now is not found by what its former owner knew.
func TestIndexIsOfItsOwner(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	counted(w)
	want(t, "bob asks first", len(w.do(t, "bob", "GET", "/api/v1/devices?search=lamp&deviceIdFilter="+string(lampA)).results()), 0)
	want(t, "alice's", len(w.get(t, "/api/v1/devices?search=lamp&deviceIdFilter="+string(lampA)).results()), 1)
	a := w.do(t, "bob", "GET", "/api/v1/devices?search=lamp&deviceIdFilter="+string(lampA))
	want(t, "bob's", len(a.results()), 0)
	want(t, "alice's again", len(w.get(t, "/api/v1/devices?search=lamp&deviceIdFilter="+string(lampA)).results()), 1)
}

// A device that goes between being chosen and being read costs the page nothing but itself.
func TestDeviceThatGoesWhileItIsSorted(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fleet(w, 9)
	_, changed := counted(w)
	w.get(t, "/api/v1/devices?sort=id")
	const gone hub.DeviceID = "d2000000-0000-4000-8000-000000000002"
	devices := w.directory.devices
	w.directory.devices = func(ctx context.Context, o hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		if len(ids) > 1 && w.pictures[gone] != nil { // the page is read
			delete(w.pictures, gone)
			changed(gone)
		}
		return devices(ctx, o, ids)
	}
	rs := w.get(t, "/api/v1/devices?sort=id&limit=4").results()
	want(t, "a whole page", len(rs), 4)
	for i, n := range []int{0, 1, 3, 4} {
		want(t, "device", rs[i]["id"].(string), fmt.Sprintf("d2000000-0000-4000-8000-%012x", n))
	}
	want(t, "and there is more", rs[3]["cursor"] != nil, true)
}

func TestIndexIsBounded(t *testing.T) {
	t.Parallel()
	var x index
	for i := range maxIndexed + 10 {
		x.put(hub.DeviceID(fmt.Sprint(i)), indexed{changes: 1, owner: alice})
	}
	want(t, "devices", len(x.devices), maxIndexed)
	_, ok := x.get(hub.DeviceID(fmt.Sprint(maxIndexed+9)), alice, 1)
	want(t, "the newest is there", ok, true)
}

// A device whose texts would take much of the index is found all the same, but read each time.
func TestLargeSummariesAreNotRemembered(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", maxSummary)
	for name, large := range map[string]func(*hub.Device){
		"name": func(d *hub.Device) { *d = *later(lamp(d.ID, long, true)) },
		"types": func(d *hub.Device) {
			types := []string{"oic.wk.d"}
			for i := range maxSummary / 40 {
				types = append(types, fmt.Sprintf("x.type.%d", i))
			}
			l, _ := d.Links.Get(deviceHref)
			l.Types = types
			d.Links = linkSet{l}
		},
		"labels": func(d *hub.Device) {
			d.Labels = hub.Labels{}
			for i := range maxSummary / 32 {
				d.Labels[fmt.Sprintf("label-%d", i)] = "a value"
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			fleet(w, 10)
			const one hub.DeviceID = "d2000000-0000-4000-8000-000000000007"
			reads, changed := counted(w)
			nothing := func(read int) {
				t.Helper()
				*reads = 0
				want(t, "found", len(w.get(t, "/api/v1/devices?search=nothing").results()), 0)
				want(t, "devices read", *reads, read)
			}
			nothing(10)
			nothing(0)
			large(w.pictures[one])
			changed(one)
			nothing(1)
			nothing(1)
			want(t, "found by its ID", len(w.get(t, "/api/v1/devices?search=000000000007").results()), 1)
			w.pictures[one] = later(later(lamp(one, "small again", true)))
			changed(one)
			nothing(1)
			nothing(0)
		})
	}
}

// What a device says of itself is shown, however long it is, and remembered only if it is short.
func TestLongDescriptionsAreNotRemembered(t *testing.T) {
	t.Parallel()
	var k descriptions
	maker := []any{}
	for range maxDescription / 32 {
		maker = append(maker, map[string]any{"language": "en", "value": "Acme"})
	}
	for i, says := range []map[string]any{{"n": strings.Repeat("x", maxDescription+1)}, {"n": "lamp", "dmn": maker}} {
		short := &hub.Resource{Seq: uint64(2*i + 1), Content: ocf(map[string]any{"n": "lamp"})}
		want(t, "a short name", k.of(lampA, short).name, "lamp")
		want(t, "remembered", len(k.devices), 1)
		long := &hub.Resource{Seq: uint64(2*i + 2), Content: ocf(says)}
		d := k.of(lampA, long)
		want(t, "the name", d.name, says["n"].(string))
		want(t, "manufacturers", len(d.manufacturer), i*len(maker))
		want(t, "remembered", len(k.devices), 0)
	}
}

// BenchmarkSearch looks for one among 10 000 devices that are known.
func BenchmarkSearch(b *testing.B) {
	w := newWorld(b)
	fleet(w, 10_000)
	counted(w)
	ids, err := w.identities.devices(b.Context(), alice)
	if err != nil {
		b.Fatal(err)
	}
	w.identities.devices = func(context.Context, hub.Owner) ([]hub.DeviceID, error) { return ids, nil }
	f := &filter{online: true, offline: true, search: search{"000000000007"}}
	find := func() {
		for _, err := range w.devices(b.Context(), alice, f) {
			if err != nil {
				b.Fatal(err)
			}
		}
	}
	find() // reads them all
	for b.Loop() {
		find()
	}
}

// The numbers are those of the list of devices: what is in no list counts nowhere.
func TestDevicesCounts(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const path = "/api/v1/devices-counts"
	online := 0
	list := w.get(t, "/api/v1/devices").results()
	for range w.get(t, "/api/v1/devices?statusFilter=ONLINE").results() {
		online++
	}
	want(t, "alice's", w.get(t, path).Body.String(), fmt.Sprintf(`{"devices":%d,"online":%d}`+"\n", len(list), online))
	want(t, "some are here, some not", online > 0 && online < len(list), true)
	w.do(t, "alice", "DELETE", "/api/v1/devices/"+string(lampB))
	want(t, "one less", w.get(t, path).Body.String(), fmt.Sprintf(`{"devices":%d,"online":%d}`+"\n", len(list)-1, online))
	want(t, "who has none", w.do(t, "bob", "GET", path).Code, 200)
	want(t, "a token is needed", w.do(t, "", "GET", path).reason(), "token-missing")
}

// Once the devices are known, only those are read to count them that changed.
func TestCountingReadsWhatChanged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	lamps := manyLamps(w, 50)
	w.identities.devices = func(ctx context.Context, o hub.Owner) ([]hub.DeviceID, error) {
		ids, err := lamps(ctx, o)
		return slices.Insert(slices.Clone(ids), 20, "d1000000-0000-4000-8000-000000000013a"), err // it is gone, and the list does not know that yet
	}
	reads, changed := counted(w)
	ask := func(what string, text string, n int) {
		t.Helper()
		*reads = 0
		want(t, what, w.get(t, "/api/v1/devices-counts").Body.String(), text+"\n")
		want(t, what+": reads", *reads, n)
	}
	ask("at first", `{"devices":50,"online":50}`, 51)
	ask("again", `{"devices":50,"online":50}`, 0)
	const one, first = "d1000000-0000-4000-8000-000000000007", "d1000000-0000-4000-8000-000000000000"
	w.pictures[one] = lamp(one, "away", false)
	delete(w.pictures, first)
	changed(one)
	changed(first)
	ask("one went away, one left", `{"devices":49,"online":48}`, 2)
	ask("again", `{"devices":49,"online":48}`, 0)
	w.get(t, "/api/v1/devices?search=lamp")
	ask("after a search", `{"devices":49,"online":48}`, 0)
}

// Counting 100 000 devices: at first, after 1 000 changed, and when none did.
func BenchmarkDevicesCounts(b *testing.B) {
	const all = 100_000
	for _, changed := range []int{0, 1_000, all} {
		b.Run(fmt.Sprintf("changed=%d", changed), func(b *testing.B) {
			w := newWorld(b)
			w.identities.devices = manyLamps(w, all)
			ids, err := w.identities.devices(b.Context(), alice)
			if err != nil {
				b.Fatal(err)
			}
			number, round := map[hub.DeviceID]uint64{}, uint64(0)
			w.directory.changes = func(id hub.DeviceID) uint64 { return number[id] }
			ask := func() {
				if a := w.get(b, "/api/v1/devices-counts"); a.Body.String() != `{"devices":100000,"online":100000}`+"\n" {
					b.Fatal(a.Body)
				}
			}
			ask()
			for b.Loop() {
				round++
				for _, id := range ids[:changed] {
					number[id] = round
				}
				ask()
			}
		})
	}
}
