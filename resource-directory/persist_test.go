package resourcedirectory

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// The tree against a map: what it holds, its order, its balance, and that former versions stay as they were.
func TestTreeIsAnImmutableSortedMap(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		type version struct {
			tree tree[int]
			want map[string]int
		}
		versions := []version{{want: map[string]int{}}}
		for i := range rapid.IntRange(1, 200).Draw(t, "steps") {
			v := versions[rapid.IntRange(max(0, len(versions)-3), len(versions)-1).Draw(t, "from")]
			key := fmt.Sprintf("/%02d", rapid.IntRange(0, 60).Draw(t, "key"))
			next := version{v.tree, maps.Clone(v.want)}
			if rapid.Bool().Draw(t, "put") {
				next.tree = v.tree.put(key, i)
				next.want[key] = i
			} else {
				next.tree = v.tree.remove(key)
				delete(next.want, key)
			}
			versions = append(versions, next)
		}
		for _, v := range versions {
			var want []int
			for _, key := range slices.Sorted(maps.Keys(v.want)) {
				want = append(want, v.want[key])
				if got, ok := v.tree.get(key); !ok || got != v.want[key] {
					t.Fatalf("get %s: %d, %t", key, got, ok)
				}
			}
			if got := slices.Collect(v.tree.all()); !slices.Equal(got, want) || v.tree.n != len(want) {
				t.Fatalf("holds %v (%d), want %v", got, v.tree.n, want)
			}
			if _, ok := v.tree.get("/none"); ok {
				t.Fatal("found what is not there")
			}
			balanced(t, v.tree.root)
		}
	})
}

func balanced(t *rapid.T, n *node[int]) {
	if n == nil {
		return
	}
	if d := n.left.tall() - n.right.tall(); d < -1 || d > 1 || n.height != 1+max(n.left.tall(), n.right.tall()) {
		t.Fatalf("node %s is out of balance by %d", n.key, d)
	}
	balanced(t, n.left)
	balanced(t, n.right)
}

// Sorted insertion is what a device's numbered hrefs do; a change must stay cheap.
func TestTreeCopiesAPathOnly(t *testing.T) {
	var tr tree[int]
	for i := range 10000 {
		tr = tr.put(fmt.Sprintf("/r/%05d", i), i)
	}
	if h := tr.root.height; h > 18 {
		t.Errorf("10 000 sorted keys are %d deep", h)
	}
	if n := testing.AllocsPerRun(100, func() { tr.put("/r/05000", 1) }); n > 18 {
		t.Errorf("a change copies %.0f nodes", n)
	}
}
