package resourcedirectory

import "iter"

// tree is an immutable sorted map (an AVL tree whose changed path is copied). A change costs O(log n) time and memory and
// leaves the former tree as it was, so a picture handed to a reader stays true while the worker goes on. Balance does not
// depend on the keys: a device cannot choose hrefs that make it slow. The zero value is empty.
type tree[V any] struct {
	root *node[V]
	n    int
}

type node[V any] struct {
	key         string
	val         V
	left, right *node[V]
	height      int
}

func (t tree[V]) get(key string) (V, bool) {
	for n := t.root; n != nil; {
		switch {
		case key < n.key:
			n = n.left
		case key > n.key:
			n = n.right
		default:
			return n.val, true
		}
	}
	var zero V
	return zero, false
}

func (t tree[V]) put(key string, val V) tree[V] {
	root, added := t.root.put(key, val)
	if added {
		t.n++
	}
	t.root = root
	return t
}

func (t tree[V]) remove(key string) tree[V] {
	if _, ok := t.get(key); !ok {
		return t
	}
	return tree[V]{root: t.root.remove(key), n: t.n - 1}
}

// all yields the values in key order.
func (t tree[V]) all() iter.Seq[V] {
	return func(yield func(V) bool) { t.root.walk(yield) }
}

func (n *node[V]) walk(yield func(V) bool) bool {
	return n == nil || n.left.walk(yield) && yield(n.val) && n.right.walk(yield)
}

func (n *node[V]) put(key string, val V) (root *node[V], added bool) {
	if n == nil {
		return &node[V]{key: key, val: val, height: 1}, true
	}
	c := *n
	switch {
	case key < n.key:
		c.left, added = n.left.put(key, val)
	case key > n.key:
		c.right, added = n.right.put(key, val)
	default:
		c.val = val
		return &c, false
	}
	return c.balanced(), added
}

// remove expects the key to be there.
func (n *node[V]) remove(key string) *node[V] {
	c := *n
	switch {
	case key < n.key:
		c.left = n.left.remove(key)
	case key > n.key:
		c.right = n.right.remove(key)
	case n.left == nil:
		return n.right
	case n.right == nil:
		return n.left
	default:
		next := n.right
		for next.left != nil {
			next = next.left
		}
		c.key, c.val = next.key, next.val
		c.right = n.right.remove(next.key)
	}
	return c.balanced()
}

func (n *node[V]) tall() int {
	if n == nil {
		return 0
	}
	return n.height
}

// balanced makes a root whose sides differ by at most one of n, which is a fresh copy whose sides differ by at most two.
func (n *node[V]) balanced() *node[V] {
	switch d := n.left.tall() - n.right.tall(); {
	case d > 1:
		l := *n.left
		if l.left.tall() < l.right.tall() {
			r := *l.right
			l.right, r.left = r.left, &l
			l.measure()
			n.left, r.right = r.right, n
			n.measure()
			r.measure()
			return &r
		}
		n.left, l.right = l.right, n
		n.measure()
		l.measure()
		return &l
	case d < -1:
		r := *n.right
		if r.right.tall() < r.left.tall() {
			l := *r.left
			r.left, l.right = l.right, &r
			r.measure()
			n.right, l.left = l.left, n
			n.measure()
			l.measure()
			return &l
		}
		n.right, r.left = r.left, n
		n.measure()
		r.measure()
		return &r
	}
	n.measure()
	return n
}

func (n *node[V]) measure() { n.height = 1 + max(n.left.tall(), n.right.tall()) }
