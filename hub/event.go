package hub

// EventKind says what happened to a device.
type EventKind uint8

// The kinds of events. Numbers are stored: never reuse one.
const (
	Registered       EventKind = 1 // a new owner and generation; stamps all later events
	Unregistered     EventKind = 2
	MetadataUpdated  EventKind = 3 // Event.Metadata is the whole new metadata
	LinksPublished   EventKind = 4 // Event.Links: new or changed links only
	LinksUnpublished EventKind = 5 // Event.Hrefs
	ResourceChanged  EventKind = 6 // Event.Href, Content, Status, ETag, Types
	// The life of a command: Event.Command always, and its ID as Correlation. Bound and late ones are no events of the API.
	CommandPending EventKind = 7  // Href, Content, Types
	CommandBound   EventKind = 8  // it is about to be sent to Command.Session, and never to another one
	CommandEnded   EventKind = 9  // Href, Types, Status, Content, ETag; for those of the twin Metadata is the whole metadata
	CommandLate    EventKind = 10 // the device answered after the command's end: Href, Status, Content, ETag
	// LabelsChanged carries all labels after the change, as a JSON object in Event.Content. Numbers below 32 are for what the
	// client API has a form for.
	LabelsChanged EventKind = 32
)

// Limits of a commit.
const (
	MaxCommitEvents = 256
	MaxCommitBytes  = 480 << 10
)

// Event is one thing that happened to one device. Which fields are set depends on the kind.
type Event struct {
	Kind EventKind
	Href Href // of ResourceChanged and commands
	// Version counts the events of this event's aggregate from 0: the device's links, its metadata, or one resource.
	Version     uint64
	Session     uint64 // number of the session that caused it, 0 = none
	Message     uint64 // message number within that session
	Connection  string // random connection ID
	User        string // sub of whoever caused it
	Correlation string
	Status      Status
	ETag        []byte
	Types       []string // resource types at the time of the event
	Content     Content
	Links       []Link
	Hrefs       []Href
	Metadata    *Metadata
	Command     *CommandEvent
}

// Commit is what one request, or several that waited together, made of one device: the unit that is stored, fenced and fed.
type Commit struct {
	Device     DeviceID
	Seq        uint64   // without holes, from 1
	ID         [16]byte // random
	Writer     string   // the process that wrote it
	Number     uint64   // running number of that writer
	Time       int64    // Unix nanoseconds; never goes back within a device
	Owner      Owner
	Generation uint64
	Events     []Event // 1 to MaxCommitEvents
}

// Position is a commit's place in the feed of all devices: a day (days since 1970, never going back) and a running number.
// Positions are ordered by Day, then N. The zero position is before everything.
type Position struct {
	Day uint32
	N   uint64
}

// Compare orders positions: -1, 0 or +1.
func (p Position) Compare(q Position) int {
	switch {
	case p.Day != q.Day && p.Day < q.Day, p.Day == q.Day && p.N < q.N:
		return -1
	case p == q:
		return 0
	}
	return 1
}
