package hub

import "time"

// Protocol is how a device is attached, with the numbers of the client API.
type Protocol uint8

// The protocols.
const (
	ProtocolUnknown  Protocol = 0
	ProtocolCoAP     Protocol = 1
	ProtocolCoAPS    Protocol = 2
	ProtocolCoAPTCP  Protocol = 3
	ProtocolCoAPSTCP Protocol = 4
	ProtocolC2C      Protocol = 5
)

// String is the URI scheme of a way in, "unknown" for what is none: logs and the command line say it.
func (p Protocol) String() string {
	switch p {
	case ProtocolCoAP:
		return "coap"
	case ProtocolCoAPS:
		return "coaps"
	case ProtocolCoAPTCP:
		return "coap+tcp"
	case ProtocolCoAPSTCP:
		return "coaps+tcp"
	case ProtocolC2C:
		return "c2c"
	case ProtocolUnknown:
	}
	return "unknown"
}

// TwinState says how fresh a device's twin is, with the numbers of the client API.
type TwinState uint8

// The twin's states.
const (
	TwinOutOfSync TwinState = 0
	TwinDisabled  TwinState = 1
	TwinSyncing   TwinState = 2
	TwinInSync    TwinState = 3
)

// Connection is how and since when a device is attached.
type Connection struct {
	Online         bool
	ID             string // random, of the session's connection; kept when the device goes offline
	ConnectedAt    int64  // Unix nanoseconds
	Protocol       Protocol
	Service        string   // the gateway instance that holds it; empty when offline
	LocalEndpoints []string // where the device says that it is reached in its own network; kept from session to session
}

// Twin is the state of the twin's synchronisation.
type Twin struct {
	Enabled   bool
	State     TwinState
	SyncingAt int64 // Unix nanoseconds
	InSyncAt  int64
	ForcedAt  int64
}

// Contact is the rhythm of a device that sleeps most of the time, as the hub has learnt it. The zero value is that of a device
// that is not known to sleep.
type Contact struct {
	Interval time.Duration // from one waking to the next; above zero for a device that sleeps
	Next     int64         // Unix nanoseconds: when it is expected to say something
}

// Metadata is everything about a device that is neither link nor resource.
type Metadata struct {
	Connection Connection
	Twin       Twin
	Contact    Contact // also of a device that is offline: when it was expected
}

// Session is what a sign-in gave the device: its number is the seq of the sign-in's commit, so later sessions are higher.
type Session struct {
	Device      DeviceID
	Owner       Owner
	Number      uint64
	TwinEnabled bool
	Commands    bool    // commands wait that the session may take
	Contact     Contact // as it was known before
	Former      string  // the Service of the session whose place it took; "" if the device was offline
}

// Stamp says which message of which session asks for a write. Writes of lower sessions than the device's current one are
// refused with Precondition; a message number not above the highest stored of the session is answered as done. Message 0
// never happens. A sender goes in order.
type Stamp struct {
	Device  DeviceID
	Session uint64
	Message uint64
	User    string
}

// Change is one new representation of one resource, as a notification or an answer brought it.
type Change struct {
	Href    Href
	Status  Status
	Content Content
	ETag    []byte
	Types   []string // rt from the body; empty: those of the published link
}

// Resource is the twin of one resource: the last representation received, nobody changes it.
type Resource struct {
	Href    Href
	Owner   Owner // stamp of the last change
	Types   []string
	Status  Status
	Content Content
	ETag    []byte
	Version uint64 // of the resource's aggregate
	Seq     uint64 // of the commit that brought it
	Time    int64  // Unix nanoseconds
	// The cause of the last change, for the API's event_metadata and audit_context.
	Session, Message              uint64
	Connection, User, Correlation string
}

// Deliverer is how the directory reaches a session. The gateway implements it, one for each session.
type Deliverer interface {
	// Close ends the session's connection soon and does not block; reason is for the log ("second-session", "deleted").
	Close(reason string)
	// Ready reports whether a command for href could be sent at once beside those that are bound to the session: the device takes
	// one more, has none for href, and is not known to sleep.
	Ready(href Href, bound []string) bool
	// Deliver hands over a command that is bound to the session; it does not block.
	Deliver(Command)
	// Wake says that commands wait which the session may take; it does not block.
	Wake()
}
