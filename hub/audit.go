package hub

import "time"

// AuditEntry is a call that changed something, or was meant to: who made it, when, and how it ended. Its JSON form is what
// is stored and what people get.
type AuditEntry struct {
	Number  uint64    `json:"number,string"` // counts up without end; the log gives it
	Time    time.Time `json:"time"`          // when it ended
	Door    string    `json:"door"`          // http, grpc or socket; hub: nobody asked for it
	Call    string    `json:"call"`          // the operation's stable name
	Target  string    `json:"target,omitempty"`
	User    string    `json:"user"`             // sub of the token; on the socket the user of the peer process
	Owner   Owner     `json:"owner,omitempty"`  // whom the token is for
	Client  string    `json:"client,omitempty"` // client ID of the token
	Remote  string    `json:"remote,omitempty"`
	Request string    `json:"request,omitempty"` // ID under which the log has more
	Outcome string    `json:"outcome"`           // ok, or an error's stable code
}
