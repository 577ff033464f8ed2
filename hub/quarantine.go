package hub

import "time"

// KeptWrite is something that a device in quarantine wrote: kept apart, so that people can look at it, and no part of what
// the hub knows of the device. Its JSON form is what is stored, and goes out on the API.
type KeptWrite struct {
	Number  uint64    `json:"number"` // rises from one of the device's to the next
	Time    time.Time `json:"time"`
	Session uint64    `json:"session"` // the Number of its sign-in
	Message uint64    `json:"message"` // in the session; 0 is its sign-in
	Kind    KeptKind  `json:"kind"`
	From    KeptFrom  `json:"from"`

	Changes []KeptChange `json:"changes,omitempty"` // of KeptChanged
	Links   []KeptLink   `json:"links,omitempty"`   // of KeptPublished
	Hrefs   []Href       `json:"hrefs,omitempty"`   // of KeptUnpublished
}

// KeptKind says what a kept write is. They are stored.
type KeptKind string

// The kinds.
const (
	KeptSignedIn    KeptKind = "signed-in"
	KeptChanged     KeptKind = "changed"
	KeptPublished   KeptKind = "published"
	KeptUnpublished KeptKind = "unpublished"
)

// KeptFrom is the connection that a kept write came by: it tells one of two rivals from the other.
type KeptFrom struct {
	Remote     string `json:"remote"`     // address and port
	Connection string `json:"connection"` // its ID
	Protocol   string `json:"protocol"`   // its URI scheme
	// Credential is what it has proven: "certificate" and the SHA-256 of it, "pre-shared-key", or "token".
	Credential string `json:"credential"`
}

// KeptChange is a Change as it is kept.
type KeptChange struct {
	Href        Href   `json:"href"`
	Status      Status `json:"status"`
	ContentType string `json:"contentType,omitempty"`
	Format      int32  `json:"coapContentFormat"`
	Data        []byte `json:"data,omitempty"`
}

// KeptLink is a Link as it is kept.
type KeptLink struct {
	Href       Href     `json:"href"`
	Types      []string `json:"resourceTypes"`
	Interfaces []string `json:"interfaces"`
}

// Kept is what is kept of a device in quarantine.
type Kept struct {
	Writes  []KeptWrite `json:"writes"`  // oldest first
	Dropped uint64      `json:"dropped"` // how many made room for those
}
