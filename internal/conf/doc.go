// Package conf reads one YAML file and the environment into one struct: strictly, with all mistakes reported together, and
// writes the effective values back with secrets hidden.
//
// It must not know which keys there are: the struct's yaml tags say it.
package conf
