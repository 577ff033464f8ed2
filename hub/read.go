package hub

import "iter"

// Device is an immutable picture of one device: whoever reads it may keep it, it never changes.
type Device struct {
	ID         DeviceID
	Owner      Owner
	Generation uint64
	Seq        uint64 // of the last commit in the picture
	Metadata   Metadata
	MetaCause  Cause // of the last metadata event
	Links      LinkSet
	LinksCause Cause // of the last links event
	Resources  ResourceSet
	Commands   []Command // that have not ended, in order
	Labels     Labels    // nobody changes them
}

// Cause is where the last event of an aggregate came from.
type Cause struct {
	Known                         bool // false: the aggregate has no event yet
	Version                       uint64
	Time                          int64 // Unix nanoseconds
	Session, Message              uint64
	Connection, User, Correlation string
	Owner                         Owner
}

// LinkSet is an immutable set of published links, in href order.
type LinkSet interface {
	Len() int
	Get(Href) (Link, bool)
	All() iter.Seq[Link]
}

// ResourceSet is an immutable set of twins, in href order.
type ResourceSet interface {
	Len() int
	Get(Href) (*Resource, bool)
	All() iter.Seq[*Resource]
}
