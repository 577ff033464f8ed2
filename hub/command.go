package hub

import "time"

// CommandKind says what a command asks of a device. Numbers are stored: never reuse one.
type CommandKind uint8

// The kinds of commands. The last three are about the twin and not about one resource.
const (
	CommandCreate   CommandKind = 1
	CommandRetrieve CommandKind = 2
	CommandUpdate   CommandKind = 3
	CommandDelete   CommandKind = 4
	CommandTwinOn   CommandKind = 5
	CommandTwinOff  CommandKind = 6
	CommandTwinSync CommandKind = 7 // synchronise everything anew, without what ETags would save; switches the twin on
)

// OfTwin reports whether the command is about the device's twin, and has no href.
func (k CommandKind) OfTwin() bool { return k >= CommandTwinOn }

// CommandEnd says how a command ended. Each command ends once. Numbers are stored: never reuse one.
type CommandEnd uint8

// The ends.
const (
	CommandCompleted   CommandEnd = 1 // the device answered; the status says what
	CommandCancelled   CommandEnd = 2 // by a caller, by a newer command, or with its device
	CommandExpired     CommandEnd = 3 // its time was over; if it had been sent it may have been carried out
	CommandUnavailable CommandEnd = 4 // it was sent, and no answer can come any more; it may have been carried out
)

// Methods that an order may name in place of the one its kind stands for: codes of RFC 8132.
const (
	MethodFetch  uint8 = 5 // of a retrieve, which then has a content
	MethodPatch  uint8 = 6 // of an update
	MethodIPatch uint8 = 7 // of an update
)

// Limits of commands.
const (
	MinCommandTTL  = 100 * time.Millisecond
	MaxCommandTTL  = 366 * 24 * time.Hour
	MaxInterface   = 250 // bytes of a resource interface: with "if=" it fits a Uri-Query (RFC 7252, Section 5.10)
	MaxCommandKey  = 255 // bytes of an idempotency key
	MaxCommandTags = 16  // ETags of a retrieve, and of a condition
)

// CommandEvent is what events of commands have beside the fields of all events.
type CommandEvent struct {
	Kind       CommandKind
	End        CommandEnd // CommandEnded only
	Interface  string     // OCF interface to ask the resource with, "" = its default
	ETags      [][]byte   // retrieve: what the caller has
	IfMatch    [][]byte   // a condition that the device is to check: ETags of which its own must be one; an empty one is any
	ValidUntil int64      // Unix nanoseconds
	Key        string     // idempotency key, "" = none
	Digest     []byte     // CommandPending with a key: of what the caller asked for, by which a repeat is known
	Session    uint64     // the session that the command is bound to; 0 = it waits for one
	// Code is one of CoAP's. Of a command that has not ended it is the method, 0 for that of its kind; of CommandEnded and
	// CommandLate it is what the device answered, 0 if it did not, or nothing that can be read.
	Code uint8
}

// Command is a command that has not ended.
type Command struct {
	CommandEvent
	Device  DeviceID
	ID      string // correlation ID, random
	Href    Href   // empty for those of the twin
	Content Content
	Types   []string // resource types of the published link
	Seq     uint64   // of the commit that brought it; with Index the order of a device's commands
	Index   int      // of the event in that commit
	Cause   Cause    // of the pending event
}

// Taken is a command that a session has and has not done with, also if it ended otherwise meanwhile.
type Taken struct {
	ID   string
	Href Href
}

// Order is what a caller wants of a device.
type Order struct {
	Device    DeviceID
	Kind      CommandKind
	Method    uint8 // MethodFetch, MethodPatch, MethodIPatch; 0 = that of the kind
	Href      Href
	Interface string
	Content   Content
	ETags     [][]byte
	TTL       time.Duration // 0 = the directory's default
	Key       string        // a repeat with the same key within 24 h has the first one's outcome
	// Asked is what the caller sent, if Content was made of that: a repeat is known by it, since what is made of it may change.
	Asked Content
	// Repeat takes only what repeats an order with the key, else NotFound.
	Repeat bool
	// Force takes resources that are not published and never reported.
	Force bool
	// Supersede cancels the commands of the same kind and resource that were not sent yet.
	Supersede bool
	// IfMatch has ETags of which the twin's must be one, else Precondition; empty = no condition. An empty ETag in it stands
	// for any (RFC 9110, Section 13.1.1: *).
	IfMatch [][]byte
	IfSeq   []uint64 // the same for twins without an ETag: seqs of which the one that brought the twin must be one
	// ForwardIfMatch has the device check IfMatch, too: it knows what the twin does not know yet. What no device can have for an
	// ETag, being longer than 8 bytes, is left out.
	ForwardIfMatch bool
	User           string
	Connection     string // of the caller, for the event's metadata
	// Async returns as soon as the command is stored.
	Async bool
}

// Answer is what came of a command on its session.
type Answer struct {
	End     CommandEnd // CommandCompleted or CommandUnavailable
	Status  Status
	Code    uint8 // of CoAP, as the device answered; 0 = none
	Content Content
	ETag    []byte
}

// Outcome is how a command ended. The zero value is that of an asynchronous one, which has not.
type Outcome struct {
	Answer
	Kind     CommandKind
	Device   DeviceID
	Href     Href
	Types    []string
	Metadata *Metadata // of commands of the twin: the metadata afterwards
	Cause    Cause     // of the event that ended it
}

// OutcomeOf makes an outcome of the event at index i of a commit, which is CommandEnded.
func OutcomeOf(c *Commit, i int) Outcome {
	ev := &c.Events[i]
	return Outcome{
		Answer: Answer{End: ev.Command.End, Status: ev.Status, Code: ev.Command.Code, Content: ev.Content, ETag: ev.ETag},
		Kind:   ev.Command.Kind, Device: c.Device, Href: ev.Href, Types: ev.Types, Metadata: ev.Metadata, Cause: CauseOf(c, i),
	}
}

// CauseOf is where the event at index i of a commit came from.
func CauseOf(c *Commit, i int) Cause {
	ev := &c.Events[i]
	return Cause{
		Known: true, Version: ev.Version, Time: c.Time, Session: ev.Session, Message: ev.Message, Connection: ev.Connection,
		User: ev.User, Correlation: ev.Correlation, Owner: c.Owner,
	}
}

// CommandPick says which commands of a device are meant.
type CommandPick struct {
	All  bool     // whatever they are for; Twin and Href do not count
	Twin bool     // those of the twin, else those of Href
	Href Href     //
	IDs  []string // empty = all of them
}
